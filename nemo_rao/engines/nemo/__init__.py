"""NeMo 2's LLM collection as the engine. NeMo and Lightning are imported here alone."""
