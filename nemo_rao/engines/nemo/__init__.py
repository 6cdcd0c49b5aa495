"""The NeMo 2 engine, on NeMo's LLM collection. Only this package imports NeMo and Lightning."""
