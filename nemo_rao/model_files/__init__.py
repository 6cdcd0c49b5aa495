"""Models in Hugging Face's format, as files: which weights they have, and how their config.json is spelled."""
