"""Runs as SLURM jobs: configuration, submission, following and status. Nothing is imported here."""
