"""Typed run configuration: its keys, how YAML and overrides become one, and what is checked between keys."""
