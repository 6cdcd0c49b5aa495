"""Megatron-core: the model's layers without Transformer Engine, the forward pass, the loss, the reference pass.

Depends on megatron-core, the objectives and the ops, but not on NeMo or Lightning.
"""
