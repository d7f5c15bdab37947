"""Presets: `base.py` is the schema, every other file is a `--config`."""
