"""The one place that knows this package's version."""

from importlib.metadata import version

__version__ = version("vitdeploy")
