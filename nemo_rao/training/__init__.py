"""Runs, from a recipe to a trained model: one, several in a row, and scores by a trained one."""
