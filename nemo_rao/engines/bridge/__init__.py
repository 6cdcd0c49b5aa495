"""Megatron-Bridge as an engine: the only part of the package that imports it."""
