"""Align Megatron GPT models with explicit rewards: RAO, DPO and their family, as a NeMo plugin."""

__version__ = "0.2.0"
