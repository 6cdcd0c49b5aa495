"""Benchmarks of nemo_rao and of its baselines. Not part of the package; run from the repository's root."""
