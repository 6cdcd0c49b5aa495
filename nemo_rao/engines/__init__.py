"""Engines that drive Megatron, one package each."""
