"""The command line: parsing and printing only, one file per verb. ``main`` is the entry point."""

from __future__ import annotations

from vitdeploy.cli.app import main

__all__ = ["main"]
