"""Rewrites layers that torch has under many names into few: linear, convolution, embedding, recurrent.

Graph in normal form in; the same graph out, whose weights are parameters that the tables in ``layers.py`` know.
"""
