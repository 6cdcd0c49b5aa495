"""NeMo: typed run configuration, recipes, and what turns both into a training run. Nothing is imported here."""
