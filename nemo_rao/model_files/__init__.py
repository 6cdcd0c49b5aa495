"""Files of models in Hugging Face's format: their weights and their config.json."""
