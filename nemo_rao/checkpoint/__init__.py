"""Checkpoints on disk: finding them, reading them safely, and what may change when a run resumes."""
