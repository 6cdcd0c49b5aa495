"""NeMo's LoRA for runs: names of the whole model, initialization independent of parallelism, resumable checkpoints.

Imports NeMo; what can be checked without it is in :mod:`nemo_rao.config.lora_targets`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel
from nemo.collections import llm
from nemo.collections.llm.peft.lora import LoRALinear
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.lightning.pytorch.callbacks.peft import WrappedAdapterIO
from torch import nn

from nemo_rao.checkpoint.adapters import METADATA, digest_of_weights
from nemo_rao.config.lora_targets import KEY, OUTPUT_LAYER, adapted, lora_targets
from nemo_rao.config.lora_targets import linear_layers as names_of_linear_layers
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.mcore import adapters
from nemo_rao.mcore.heads import is_of_head, train_heads
from nemo_rao.runtime.console import is_first_rank


def lora(config: RunConfig) -> NamedLoRA | None:
    """Return the LoRA transform of a run, or ``None`` if all weights are trained."""
    if config.model.peft.scheme == "none":
        return None
    keys = config.model.peft.lora
    return NamedLoRA(
        dim=keys.dim,
        alpha=keys.alpha,
        dropout=keys.dropout,
        target_modules=list(lora_targets(config)),
        seed=config.trainer.seed,
    )


@dataclass
class NamedLoRA(llm.peft.LoRA):
    """NeMo's LoRA, with targets named as in the whole model.

    NeMo numbers layers by pipeline stage. Adapters read the linear layer's input with or without Transformer Engine.

    Attributes:
        seed: seed of the adapters' initialization.
    """

    seed: int = field(kw_only=True)

    def __call__(self, model: Any) -> Any:
        chunks = [module for module in model.modules() if isinstance(module, GPTModel)]
        every = names_of_linear_layers(
            chunks[0].config.num_layers, experts=chunks[0].config.num_moe_experts is not None
        )
        wanted = set(adapted(self.target_modules, every))
        here = {id(layer): name for chunk in chunks for name, layer in adapters.linear_layers(chunk)}
        self._names = {number: name for number, name in here.items() if name in wanted}
        if not self._names:
            raise UserError(
                f"{KEY}={self.target_modules}: a pipeline stage has no adapter to train. Add a target there."
            )
        model = super().__call__(model)
        adapters.feed_normed_inputs(model)
        train_heads(model)
        for wrapper in model.modules():
            if isinstance(wrapper, LoRALinear):
                self._finish(wrapper, wanted, every)
        for chunk in chunks:
            if chunk.config.recompute_granularity is not None:
                adapters.let_embeddings_need_gradients(chunk)
        return model

    def match(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> tuple[str, str] | None:
        """Return (name, name) in the whole model if the layer gets an adapter, else ``None``."""
        found = self._names.get(id(module))
        return None if found is None else (found, found)

    def adapter_key_filter(self, key: str) -> bool:
        """Whether the tensor of this name is stored: those of adapters and of heads are."""
        return super().adapter_key_filter(key) or (isinstance(key, str) and is_of_head(key))

    def _finish(self, wrapper: LoRALinear, wanted: set[str], every: list[str]) -> None:
        name = wrapper.adapter.base_linear_name
        adapters.draw_start(wrapper.adapter, name, self.seed)
        if name == OUTPUT_LAYER:
            adapters.store_as_vocabulary(wrapper.adapter)
            adapters.show_weight(wrapper)
        elif not all(other in wanted for other in every if other.rpartition(".")[2] == name.rpartition(".")[2]):
            adapters.store_by_layer(wrapper.adapter, int(name.split(".")[2]))

    def get_wrappped_io(self) -> Any:  # NeMo's spelling
        return partial(AdapterIO, peft=self)


class AdapterIO(WrappedAdapterIO):
    """NeMo's reading and writing of adapters, which keeps the base that a run started from.

    On resume, NeMo loads the base's weights first and the adapters next, and then records the adapters' checkpoint as
    the base of those that it writes.
    """

    model_ckpt_path: Path | None = None
    _digest: str | None = None

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        base = self.model_ckpt_path
        loaded = super().load_checkpoint(path, *args, **kwargs)
        if base is not None:
            self.model_ckpt_path = base
        elif is_first_rank():
            self._digest = digest_of_weights(Path(ckpt_to_weights_subdir(self.model_ckpt_path, is_saving=False)).parent)
        return loaded

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> Any:
        request = super().save_checkpoint(checkpoint, path, storage_options)
        if is_first_rank():
            file = Path(ckpt_to_weights_subdir(path, is_saving=True)) / METADATA
            recorded = json.loads(file.read_text())
            file.write_text(json.dumps({**recorded, "model_digest": self._digest}) + "\n")
        return request
