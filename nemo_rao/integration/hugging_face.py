"""What import from and export to Hugging Face have in common: which models, their weights' names, and safe writing.

    config.json      --import-->  config_class and arch, keys of a recipe; context/model.yaml --export-->  config.json
    *.safetensors                 weights/, Megatron's torch_dist, for any parallelism                     *.safetensors
    tokenizer files               tokenizer/, and from there into every checkpoint's context/              the same

Weights are converted by NeMo's own connectors (``HFLlamaImporter``, ``HFLlamaExporter``). NeMo has such a pair for each
family, but they map the same names, except for Qwen2's biases, and Llama's alone knows tied embeddings: so Llama's
serves all families, and NeMo's transforms of biases are added. NeMo's translation of configs is not used: it unties
Qwen2, takes Mistral's attention window for its length, drops factors of Llama 3.1's rotary scaling, exports the length
that was trained on for the longest possible one, and to export it unpickles a checkpoint's context.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.integration.talk import quiet_third_parties, say

_GPT = "nemo.collections.llm.gpt.model."


@dataclass(frozen=True)
class Family:
    """A kind of model that can be converted.

    Attributes:
        architecture, model_type: its names in Hugging Face's config.json.
        module: where NeMo has its configs.
        config_class, model_class: of ``nemo.collections.llm``, for a model of any size.
        qkv_bias: queries, keys and values have biases.
    """

    architecture: str
    model_type: str
    module: str
    config_class: str
    model_class: str
    qkv_bias: bool = False


FAMILIES = (
    Family("LlamaForCausalLM", "llama", _GPT + "llama", "LlamaConfig", "LlamaModel"),
    Family("MistralForCausalLM", "mistral", _GPT + "mistral", "MistralConfig7B", "MistralModel"),
    Family("Qwen2ForCausalLM", "qwen2", _GPT + "qwen2", "Qwen2Config", "Qwen2Model", qkv_bias=True),
)
SUPPORTED = ", ".join(family.architecture for family in FAMILIES)

# Hugging Face's and Megatron's names of Qwen2's biases, each of one layer.
HF_BIASES = tuple(f"model.layers.*.self_attn.{name}_proj.bias" for name in "qkv")
MEGATRON_BIAS = "decoder.layers.*.self_attention.linear_qkv.bias"

# What a tokenizer consists of, besides config.json, which tells its class where tokenizer_config.json does not.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


class Weights:
    """Tensors by name, in the form in which NeMo's connectors take a model that is none.

    ``config`` has what splits fused queries, keys and values: ``num_attention_heads``, ``num_query_groups``,
    ``kv_channels``.
    """

    def __init__(self, tensors: Mapping[str, Any], config: SimpleNamespace) -> None:
        self._tensors = dict(tensors)
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return dict(self._tensors)


def on_cpu_alone() -> None:
    """Conversion is the CPU's, also where there are GPUs: it moves bytes. To be called before torch is imported."""
    from nemo_rao.integration.launch import started_externally

    if (launcher := started_externally()) is not None:
        raise UserError(f"{launcher} started several ranks, but one process converts a model; run it without")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # transformers offers to load both; neither takes part, and tensorflow alone takes seconds to import.
    os.environ.setdefault("USE_TF", "0")
    os.environ.setdefault("USE_FLAX", "0")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def import_nemo_aloud() -> None:
    """Imports NeMo, telling why nothing seems to happen, and keeps it from telling what it does."""
    from nemo_rao.integration.prepare import import_nemo

    if "nemo.collections.llm" not in sys.modules:
        say("importing NeMo, which takes about 20 seconds")
    import_nemo()
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(nemo_logging.ERROR)
    quiet_third_parties()


# -------------------------------------------------------------------------------------------------------- writing


def check_destination(path: str, num_bytes: int, key: str) -> Path:
    """The folder that is to be made, absolute.

    Args:
        num_bytes: what will be written there, about.
        key: the argument's name.

    Raises:
        UserError: there is something already, or no room, or it cannot be written.
    """
    folder = Path(path).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{key}: {folder} exists and is not an empty folder; name a new one, or remove it")
    present = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        what = "cannot be written to" if present.is_dir() else "is not a folder"
        raise UserError(f"{key}: {present} {what}; name another folder")
    free = shutil.disk_usage(present).free
    if free < num_bytes:
        raise UserError(
            f"{key}: {present} has {free / 1e9:.2f} GB free, and {num_bytes / 1e9:.2f} GB will be written; free some "
            "space, or name a folder on another disk"
        )
    return folder


@contextlib.contextmanager
def written_whole(folder: Path, key: str) -> Iterator[Path]:
    """A temporary folder beside ``folder``, which takes its name at the end, or is removed if anything fails.

    Raises:
        UserError: the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        yield partial
        os.rename(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (reason := _no_room(error)) is not None:
            raise UserError(
                f"{key}: {folder} could not be written ({reason}), and nothing is left of it; free some space, or name "
                "a folder on another disk"
            ) from None
        raise


_NO_ROOM = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


def _no_room(error: BaseException | None) -> str | None:
    """Why nothing more can be written, if that is what an error comes from: libraries wrap it each in their own way."""
    while error is not None:
        for number, text in _NO_ROOM.items():
            if (isinstance(error, OSError) and error.errno == number) or text in str(error):
                return text
        if "inline_container" in str(error) and "unexpected pos" in str(error):  # all that torch's writer says
            return "a write was cut short"
        error = error.__cause__ or error.__context__
    return None
