"""Configuration of the documentation: ``python -m sphinx -W -b html docs build/docs``.

The guide is written in Markdown; the reference pages come from the docstrings.
"""

from infoq_fx.core.version import __version__

project = "infoq_fx"
author = "the infoq_fx maintainers"
release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["images"]
html_theme = "alabaster"
html_theme_options = {"description": "Mixed-precision quantization for PyTorch", "page_width": "1100px"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
myst_heading_anchors = 3
