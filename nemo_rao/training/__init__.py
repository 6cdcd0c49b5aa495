"""Runs, from a recipe to a trained model: one, several in a row, and scoring by a trained model."""
