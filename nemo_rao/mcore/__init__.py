"""Megatron-core: the model's layers without Transformer Engine, the forward pass, the loss, the reference pass.

Knows megatron-core, the objectives and the ops; knows nothing of NeMo or Lightning.
"""
