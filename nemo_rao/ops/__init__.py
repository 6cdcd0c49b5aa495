"""Tensor operations on torch and process groups: token log-probabilities, sums over prompts and responses."""
