"""Responses sampled from a policy: training data made by the model itself, and the answers that benchmarks judge."""
