"""Tensor operations on torch and a process group: token log-probabilities, sums over prompts and responses."""
