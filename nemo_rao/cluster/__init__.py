"""Runs as jobs: submitted to SLURM from YAML, followed, and told of. Nothing is imported here."""
