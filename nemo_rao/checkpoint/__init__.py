"""Checkpoints on disk: found, read safely, and what of a run may change when it continues."""
