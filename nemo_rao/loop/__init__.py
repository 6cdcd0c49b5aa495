"""Hooks around the steps of a run, shared by all engines."""
