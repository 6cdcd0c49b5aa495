"""Megatron-Bridge as the engine. It is imported here alone."""
