"""Models from and to Hugging Face: ``nemo-rao import-hf`` and ``export-hf``."""
