"""Responses sampled from a policy, as training data or as answers for benchmarks."""
