"""Training runs, from a recipe to a trained model: single runs, several in a row, and scoring by a trained model."""
