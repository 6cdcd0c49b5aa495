"""Bridge's LoRA as runs have it: names of the whole model, a start that no parallelism changes, stored to resume.

Imports Bridge; what can be checked without it is in :mod:`nemo_rao.config.lora_targets`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRALinear
from torch import Tensor, nn

from nemo_rao.checkpoint.adapters import METADATA, digest_of_weights
from nemo_rao.checkpoint.layout import weights_of
from nemo_rao.config.lora_targets import KEY, OUTPUT_LAYER, adapted, lora_targets
from nemo_rao.config.lora_targets import linear_layers as names_of_linear_layers
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.mcore import adapters


def is_adapter(name: str) -> bool:
    """Whether a tensor, by its name in the model, is an adapter's."""
    return ".adapter." in name


def add_adapters(chunks: Sequence[Any], config: RunConfig) -> None:
    """Freeze a rank's model chunks, and give the linear layers that the recipe names an adapter.

    Raises:
        UserError: there is none on this pipeline stage.
    """
    keys, targets = config.model.peft.lora, list(lora_targets(config))
    made = chunks[0].config
    every = names_of_linear_layers(made.num_layers, experts=made.num_moe_experts is not None)
    wanted = set(adapted(targets, every))
    names = {id(layer): name for chunk in chunks for name, layer in adapters.linear_layers(chunk) if name in wanted}
    if not names:
        raise UserError(f"{KEY}={targets}: a pipeline stage has no adapter to train; add a target there")
    lora = _NamedLoRA(dim=keys.dim, alpha=keys.alpha, dropout=keys.dropout, target_modules=targets)
    for chunk in chunks:
        chunk.requires_grad_(False)
        for parent in list(chunk.modules()):
            for attribute, layer in list(parent.named_children()):
                if id(layer) in names:
                    wrapper = lora.transform(layer, names[id(layer)])
                    _finish(wrapper, names[id(layer)], wanted, every, config.trainer.seed)
                    setattr(parent, attribute, wrapper)
        adapters.feed_normed_inputs(chunk)
        if made.recompute_granularity is not None:
            adapters.let_embeddings_need_gradients(chunk)


@dataclass
class _NamedLoRA(LoRA):
    """Bridge's LoRA over layers that are chosen already."""

    def match(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> tuple[str, str] | None:
        return None if name is None else (name, name)


class _OutputLayer(LoRALinear):
    """An output layer with an adapter: its weight stays its own, which with tied embeddings the model asks for."""

    @property
    def weight(self) -> Tensor:
        return self.to_wrap.weight  # type: ignore[no-any-return]


def _finish(wrapper: Any, name: str, wanted: set[str], every: list[str], seed: int) -> None:
    adapters.draw_start(wrapper.adapter, name, seed)
    if name == OUTPUT_LAYER:
        adapters.store_as_vocabulary(wrapper.adapter)
        wrapper.__class__ = _OutputLayer
    elif not all(other in wanted for other in every if other.rpartition(".")[2] == name.rpartition(".")[2]):
        adapters.store_by_layer(wrapper.adapter, int(name.split(".")[2]))


def record_base(checkpoint: Path, base: Path) -> None:
    """Write which checkpoint's weights the adapters of a checkpoint change; see :mod:`nemo_rao.checkpoint.adapters`."""
    record = {"model_ckpt_path": str(base), "model_digest": digest_of_weights(base)}
    (weights_of(checkpoint) / METADATA).write_text(json.dumps(record) + "\n")
