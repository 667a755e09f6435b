"""The version of the package, which every cache and file carries."""

__all__ = ["__version__"]

__version__ = "0.1.0"
