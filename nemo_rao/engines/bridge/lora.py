"""Bridge's adapters for runs: names of the whole model, initialization independent of parallelism, resumable storage.

Imports Bridge; what can be checked without it is in :mod:`nemo_rao.config.lora_targets`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.bridge.peft.lora_layers import LoRALinear
from torch import Tensor

from nemo_rao.checkpoint.adapters import METADATA, digest_of_weights
from nemo_rao.checkpoint.layout import weights_of
from nemo_rao.config.lora_targets import KEY, OUTPUT_LAYER, adapted, fused, lora_targets, splits
from nemo_rao.config.lora_targets import linear_layers as names_of_linear_layers
from nemo_rao.config.run_config import RunConfig
from nemo_rao.engines.bridge.adapter_forms import FORMS
from nemo_rao.errors import UserError
from nemo_rao.mcore import adapters
from nemo_rao.mcore.heads import is_of_head, train_heads


def is_adapter(name: str) -> bool:
    """Whether a tensor with this name in the model belongs to an adapter."""
    return ".adapter." in name


def is_trained(name: str) -> bool:
    """Whether a tensor is trained and stored in a run of adapters: those of adapters and of heads."""
    return is_adapter(name) or is_of_head(name)


def add_adapters(chunks: Sequence[Any], config: RunConfig) -> None:
    """Freeze a rank's model chunks, and add adapters to the linear layers that the recipe names.

    Raises:
        UserError: this pipeline stage has no adapter.
    """
    peft, targets = config.model.peft, list(lora_targets(config))
    made = chunks[0].config
    every = names_of_linear_layers(made.num_layers, experts=made.num_moe_experts is not None, split=splits(config))
    wanted = set(adapted(targets, every))
    layers = {fused(name) for name in wanted}
    names = {id(layer): name for chunk in chunks for name, layer in adapters.linear_layers(chunk) if name in layers}
    if not names:
        raise UserError(f"{KEY}={targets}: a pipeline stage has no adapter to train. Add a target there.")
    wrap = FORMS[peft.scheme]
    for chunk in chunks:
        chunk.requires_grad_(False)
        for parent in list(chunk.modules()):
            for attribute, layer in list(parent.named_children()):
                if id(layer) in names:
                    wrapper, parts = wrap(layer, names[id(layer)], wanted, peft.lora)
                    for name, adapter in parts.items():
                        adapters.draw_start(adapter, name, config.trainer.seed)
                        _store(adapter, name, wanted, every)
                    if names[id(layer)] == OUTPUT_LAYER:
                        wrapper.__class__ = _OutputLayer
                    setattr(parent, attribute, wrapper)
        adapters.feed_normed_inputs(chunk)
        train_heads(chunk)
        if made.recompute_granularity is not None:
            adapters.let_embeddings_need_gradients(chunk)


class _OutputLayer(LoRALinear):
    """An output layer with an adapter. It exposes the wrapped weight, which the model reads with tied embeddings."""

    @property
    def weight(self) -> Tensor:
        return self.to_wrap.weight  # type: ignore[no-any-return]


def _store(adapter: Any, name: str, wanted: set[str], every: list[str]) -> None:
    """Set how checkpoints store an adapter of the layer, or part of one, with this name."""
    if name == OUTPUT_LAYER:
        adapters.store_as_vocabulary(adapter)
    elif not all(other in wanted for other in every if other.rpartition(".")[2] == name.rpartition(".")[2]):
        adapters.store_by_layer(adapter, int(name.split(".")[2]))


def record_base(checkpoint: Path, base: Path) -> None:
    """Record the checkpoint whose weights the adapters modify; see :mod:`nemo_rao.checkpoint.adapters`."""
    record = {"model_ckpt_path": str(base), "model_digest": digest_of_weights(base)}
    (weights_of(checkpoint) / METADATA).write_text(json.dumps(record) + "\n")
