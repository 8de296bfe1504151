"""Runtimes that execute a bundle: one module each, all behind the same two interfaces."""
