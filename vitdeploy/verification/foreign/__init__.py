"""Somebody else's artifact, held against the checkpoint that it was made from; no bundle is needed."""
