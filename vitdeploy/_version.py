"""The one place that says this package's version: a tree that nobody installed has it, too."""

__version__ = "0.1.0"
