"""The Megatron-Bridge engine: the only part of the package that imports it."""
