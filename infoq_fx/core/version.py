"""The version of the package, recorded in caches and files."""

__all__ = ["__version__"]

__version__ = "0.1.0"
