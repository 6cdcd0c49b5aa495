"""Typed run configuration: its keys, its composition from YAML and overrides, and checks across keys."""
