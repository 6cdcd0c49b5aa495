"""What drives Megatron: one package for each engine."""
