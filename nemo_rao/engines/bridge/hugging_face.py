"""Hugging Face's models through Megatron-Bridge's ``AutoBridge``, in both directions, one tensor at a time.

Import reads each tensor from its file when its parameter of the Megatron model is filled. Export gathers a tensor over
the ranks, converts it, and writes a file whenever it has collected enough: in addition to the model, which is as large
as its weights, neither direction holds more than a few tensors or one file.

Both are collectives and work under any tensor, pipeline and expert parallelism.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor

from nemo_rao.checkpoint.find import weights_of
from nemo_rao.engines.bridge.families import parts_of, register_families
from nemo_rao.errors import UserError
from nemo_rao.mcore import checkpoint
from nemo_rao.mcore.layer_spec import layer_spec_without_te

WEIGHTS = "model.safetensors"
SHARD_BYTES = 5 * 10**9  # maximum size of a file, as in transformers
_EMBEDDINGS, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


class Conversion:
    """Converts one model between the formats of Hugging Face and Megatron.

    Args:
        config: transformers' config, with ``architectures``.
        name: name of the model, for messages.

    Attributes:
        provider: Bridge's description of the Megatron model, on layers without Transformer Engine.

    Raises:
        UserError: Bridge does not support the architecture, or only with Transformer Engine.
    """

    def __init__(self, config: Any, name: str) -> None:
        register_families()
        architecture = ", ".join(config.architectures or [f"model_type {config.model_type}"])
        if not AutoBridge.supports(config) or architecture not in AutoBridge.list_supported_models():
            raise UserError(
                f"{name} is a {architecture}, which the installed {_release()} does not support. Use another model."
            )
        self._name = name
        self._tied, self._vocab_size = bool(config.tie_word_embeddings), config.vocab_size
        self._bridge = AutoBridge.from_hf_config(config)
        self.provider = self._bridge.to_megatron_provider(load_weights=False)
        parts = parts_of(self.provider, f"{name}: {architecture}")
        self.provider.transformer_layer_spec = functools.partial(layer_spec_without_te, parts=parts)

    def build(self, dtype: torch.dtype, **parallelism: Any) -> list[Any]:
        """Build this rank's model chunks, without their weights.

        Args:
            dtype: dtype of the weights.
            parallelism: fields of Megatron's config, such as ``tensor_model_parallel_size``.
        """
        fields = {
            **parallelism,
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "autocast_dtype": dtype,
            "bf16": dtype is torch.bfloat16,
            "fp16": dtype is torch.float16,
            "perform_initialization": False,
            "should_pad_vocab": parallelism.get("tensor_model_parallel_size", 1) > 1,
        }
        for name, value in fields.items():
            setattr(self.provider, name, value)
        self.provider.finalize()
        with contextlib.redirect_stdout(io.StringIO()):  # Bridge prints numbers of parameters
            chunks: list[Any] = self.provider.provide_distributed_model(
                wrap_with_ddp=False, mixed_precision_wrapper=None
            )
        return chunks

    def names(self, chunks: list[Any], folder: Path) -> set[str]:
        """Return Hugging Face's names of all tensors that fill the chunks of all ranks.

        Args:
            folder: directory with safetensors.
        """
        wanted: set[str] = set()
        for task in self._bridge.get_conversion_tasks(chunks, folder):
            if task is not None:
                names = task.mapping.hf_param
                wanted |= {names} if isinstance(names, str) else set(names.values())
        of_ranks: list[set[str]] = [set()] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, wanted)  # each rank knows only its own experts
        return set().union(*of_ranks)

    def load(self, chunks: list[Any], folder: Path) -> None:
        """Fill the chunks with the weights of a Hugging Face model.

        Bridge leaves a weight unchanged if its tensor is missing, and ignores tensors without a counterpart: compare
        :meth:`names` with the stored ones.

        Args:
            folder: directory with config.json and safetensors.

        Raises:
            UserError: a tensor has another shape.
        """
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # a progress bar
                self._bridge.load_hf_weights(chunks, folder)
        except (ValueError, RuntimeError, KeyError) as error:  # raised for shapes; the class depends on the mapping
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self._name}: the tensors do not fit config.json ({reason}). Download it again."
            ) from None

    def tensors(self, chunks: list[Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield Hugging Face's names and whole tensors on the CPU, one after another, on every rank."""
        for name, tensor in self._bridge.export_hf_weights(chunks, cpu=True, show_progress=False):
            if not (self._tied and name == _OUTPUT):
                # Megatron pads the vocabulary to a multiple of its ranks.
                yield name, tensor[: self._vocab_size] if name in (_EMBEDDINGS, _OUTPUT) else tensor


def _release() -> str:
    import megatron.bridge

    return f"Megatron-Bridge {megatron.bridge.__version__}"


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype | None, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors as safetensors for ``from_pretrained``: one file, or several and an index.

    Args:
        dtype: dtype to cast to; ``None``: unchanged.
        shard_bytes: maximum size of a file; a larger tensor gets a separate file.
    """
    written: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    num_bytes = total = 0
    for name, tensor in tensors:
        kept = tensor.detach().to(dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)
        size = kept.numel() * kept.element_size()
        if shard and num_bytes + size > shard_bytes:
            written.append(_write(shard, folder, len(written)))
            shard, num_bytes = {}, 0
        shard[name] = kept
        num_bytes, total = num_bytes + size, total + size
    written.append(_write(shard, folder, len(written)))
    if len(written) == 1:
        os.rename(folder / _numbered(0), folder / WEIGHTS)
        return
    index: dict[str, str] = {}
    for number, names in enumerate(written):
        name = f"model-{number + 1:05}-of-{len(written):05}.safetensors"
        os.rename(folder / _numbered(number), folder / name)
        index |= dict.fromkeys(names, name)
    described = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(described, indent=2) + "\n")


def _numbered(number: int) -> str:
    return f"shard-{number}.safetensors"  # the number of files is known only at the end


def _write(shard: Mapping[str, Tensor], folder: Path, number: int) -> list[str]:
    from safetensors.torch import save_file

    save_file(dict(shard), folder / _numbered(number), metadata={"format": "pt"})
    return list(shard)


def save_checkpoint(chunks: list[Any], folder: Path) -> None:
    """Write the weights of one rank's model as ``folder/weights``, with the names of NeMo's checkpoints."""
    (folder / "weights").mkdir()
    dist_checkpointing.save(checkpoint.sharded_model(chunks, prefix=checkpoint.PREFIX), str(folder / "weights"))
    checkpoint.write_common(folder / "weights")


def load_checkpoint(chunks: list[Any], folder: Path, *, tied_before: bool = False) -> None:
    """Fill the chunks of one rank's model from a checkpoint of either engine.

    Args:
        tied_before: the checkpoint has one matrix for input and output embeddings, but the model has two.

    Raises:
        UserError: the checkpoint lacks a tensor of the model.
    """
    [chunk] = chunks

    def is_stored(name: str) -> bool:
        return not (tied_before and name == "output_layer.weight")

    try:
        checkpoint.load_weights(weights_of(folder), chunks, keep=is_stored)
    except CheckpointingException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"CHECKPOINT: {folder} does not match the model described beside it ({reason}). Restore the checkpoint."
        ) from None
    if tied_before:
        with torch.no_grad():
            chunk.output_layer.weight.copy_(chunk.embedding.word_embeddings.weight)


def change_weights(chunks: list[Any], change: Callable[[dict[str, Tensor]], None]) -> None:
    """Replace weights of a model on one rank.

    Args:
        change: receives all weights by name, ``[out, in]`` each, and replaces some in place; those of a vocabulary may
            be without padding.
    """
    [chunk] = chunks
    parameters = dict(chunk.named_parameters())
    weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    before = dict(weights)
    change(weights)
    with torch.no_grad():
        for name, weight in weights.items():
            if weight is not before[name]:
                parameters[name][: len(weight)].copy_(weight)
