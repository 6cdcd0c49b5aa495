"""The policy of a training run in Hugging Face's format: its config.json, and its weights tensor by tensor.

Supports the Llama-like families on both engines. The result equals the output of
:mod:`nemo_rao.hugging_face.exporter` for the same weights, without a checkpoint in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nemo_rao.config.derived import run_dir
from nemo_rao.config.engine_choice import engine_name
from nemo_rao.config.lora_targets import OUTPUT_LAYER, lora_targets
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.adapters import PARTS, merge, split_qkv
from nemo_rao.hugging_face.checkpoint import LAYERS
from nemo_rao.hugging_face.described import describe_run
from nemo_rao.hugging_face.network import check_expressible
from nemo_rao.hugging_face.source_weights import EMBEDDINGS, OUTPUT
from nemo_rao.hugging_face.target import Target, target_config

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "online.sampler=vllm"
_NORMS = {
    "decoder.final_layernorm": "model.norm",
    "self_attention.linear_qkv.layer_norm": "input_layernorm",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "mlp.linear_fc1.layer_norm": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Policy:
    """Converts the weights of a run's model to those of a Hugging Face model.

    Attributes:
        config_json: the model's config.json.
        dtype: torch name of the dtype of the weights.
        vocab_size: V without padding.
        network: ``num_attention_heads``, ``num_query_groups``, ``kv_channels``.
        lora: ``alpha`` and ``dim``, or ``None``.
        tied: whether the model has one matrix for input and output embeddings. vLLM's model gets two with the same
            values: on a CPU it keeps its own copy of a tied output layer, which new weights do not reach.
    """

    config_json: str
    dtype: str
    vocab_size: int
    network: SimpleNamespace
    lora: Mapping[str, Any] | None
    tied: bool

    def tensors(self, given: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Convert names and tensors to Hugging Face's, with adapters merged.

        Args:
            given: Megatron's names, with layer numbers, and full tensors; adapters come first.
        """
        import torch

        adapters: dict[str, Tensor] = {}
        for name, tensor in given:
            if ".adapter." in name:
                adapters[name] = tensor
                continue
            layer = name.removesuffix(".weight")
            own = {one: value for one, value in adapters.items() if one.startswith(f"{layer}.adapter.")}
            if own:
                assert self.lora is not None
                weights = {name: tensor}
                merge(weights, own, self.lora)
                tensor = weights[name]
            for to, value in self._converted(name, tensor):
                yield to, value.to(vars(torch)[self.dtype])

    def _converted(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        if name == "embedding.word_embeddings.weight":
            return [(name, tensor[: self.vocab_size]) for name in (EMBEDDINGS, *([OUTPUT] if self.tied else []))]
        if name == "output_layer.weight":
            return [(OUTPUT, tensor[: self.vocab_size])]
        number, _, part = name.removeprefix(LAYERS).partition(".")
        before, part = (f"model.layers.{number}.", part) if name.startswith(LAYERS) else ("", name)
        module, _, kind = part.rpartition(".")
        norm = module + ".layer_norm" if kind == "layer_norm_weight" else module
        if norm in _NORMS:
            return [(f"{before}{_NORMS[norm]}.weight", tensor)]
        linear = module.rpartition(".")[2]
        parts = split_qkv(tensor, self.network) if linear == "linear_qkv" else tensor.chunk(len(PARTS[linear]))
        return [(f"{before}{to}.{kind}", value) for to, value in zip(PARTS[linear], parts, strict=True)]


def policy_of(config: RunConfig, num_tokens: int) -> Policy:
    """Build the :class:`Policy` of a run. Imports megatron.

    Args:
        num_tokens: V without padding.

    Raises:
        UserError: config.json cannot describe the model, or its adapters cannot be merged.
    """
    from nemo_rao.data.encode import load_tokenizer

    location = f"{_KEY}: the model of this run"
    described = describe_run(
        config, run_dir(config), str(Path(config.data.tokenizer or "").expanduser()), engine_name(config)
    )
    if described.family.nemo_model is None:
        raise UserError(f"{_KEY}: {described.family.architecture} is not supported yet. Set online.sampler=megatron.")
    check_expressible(vars(described.config), described.family, location)
    tied = bool(described.config.share_embeddings_and_output_weights)
    if tied and described.lora is not None and OUTPUT_LAYER in lora_targets(config):
        raise UserError(
            f"{_KEY}: an adapter of the output layer unties it from the embeddings, which are one matrix in vLLM's "
            f"model. Leave {OUTPUT_LAYER} out of model.peft.lora.target_modules, or set online.sampler=megatron."
        )
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.precision.params]
    target = Target(described.folder, dtype, described.config.vocab_size or num_tokens, None)
    made = target_config(described, target, load_tokenizer(described.tokenizer), tied=False)
    names = ("num_attention_heads", "num_query_groups", "kv_channels")
    network = SimpleNamespace(**{name: getattr(described.config, name) for name in names})
    return Policy(made.to_json_string(use_diff=True), dtype, target.vocab_size, network, described.lora, tied)
