"""From a model to an exported program, and from a program to a graph module in normal form."""
