"""A verified bundle as a folder that another server loads: one file per target, ``base.py`` for all."""
