"""Conversion by Megatron-Bridge: what its environment does in the place of NeMo's connectors.

    *.safetensors  <--engines/bridge/hugging_face.py-->  weights/

transformers' config, not the recipe, says what model Bridge builds; :mod:`nemo_rao.hugging_face.config_keys` has read
every key of it by then.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_rao.config.families import BRIDGE_ROPE_SCALING
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.conversion import bridge_of_one_rank
from nemo_rao.hugging_face.families import Family
from nemo_rao.hugging_face.source import EMBEDDINGS, KEY, OUTPUT
from nemo_rao.model_files.weights import read_headers
from nemo_rao.runtime.console import say

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def check_bridge_can(config: Any, family: Family, folder: Path) -> None:
    """Refuses what Bridge would take for something else.

    Args:
        config: from :func:`nemo_rao.hugging_face.config_keys.read_config`.

    Raises:
        UserError: names the key.
    """
    if family.scaling != "llama3" or not config.rope_scaling:
        return
    for name, value in BRIDGE_ROPE_SCALING.items():
        if config.rope_scaling[name] != value:
            raise UserError(
                f"{KEY}: {folder / 'config.json'}: rope_scaling.{name} ({config.rope_scaling[name]}) cannot be "
                f"imported: Megatron-Bridge has {value}, as published models do"
            )


def import_weights(files: list[Path], given: Mapping[str, Any], family: Family, folder: Path) -> None:
    """Write ``folder/weights``, a checkpoint of the model.

    Args:
        files: the weights.
        given: config.json.
    """
    source = files[0].parent
    with contextlib.ExitStack() as stack:
        if any(file.suffix != ".safetensors" for file in files):
            source = stack.enter_context(_without_pickles(files, folder))
        stored = {
            dtype
            for header in read_headers(source, sorted(source.glob("*.safetensors")), KEY).values()
            for dtype, _ in header.tensors.values()
        }
        stack.enter_context(bridge_of_one_rank())
        import torch

        from nemo_rao.engines.bridge.hugging_face import Conversion, save_checkpoint

        if unknown := sorted(stored - set(_DTYPES)):
            raise UserError(f"{KEY}: {source}: tensors are {unknown[0]}; {', '.join(_DTYPES)} can be imported")
        # All in the widest of their formats, so that nothing is rounded.
        dtype = vars(torch)[_DTYPES[stored.pop()]] if len(stored) == 1 else torch.float32
        config = transformers_config(given, family)
        if config.tie_word_embeddings:
            _check_tie(source, files[0].parent)
        conversion = Conversion(config, f"{KEY}: {files[0].parent}")
        say("reading and converting the weights")
        chunks = conversion.build(dtype)
        conversion.load(chunks, source)
        say("writing the checkpoint")
        save_checkpoint(chunks, folder)


def _check_tie(source: Path, folder: Path) -> None:
    """Refuses a stored output layer that is not the embeddings, where config.json ties the two.

    Args:
        source: of the weights.
        folder: that the user named.
    """
    import torch
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys() if name in (EMBEDDINGS, OUTPUT)}  # noqa: SIM118
    if OUTPUT in found and not torch.equal(found[OUTPUT], found[EMBEDDINGS]):
        raise UserError(
            f"{KEY}: {folder}: config.json ties the embeddings (tie_word_embeddings), but {OUTPUT} is stored "
            "with other values; set tie_word_embeddings to false in config.json if both matrices are the model's"
        )


def transformers_config(given: Mapping[str, Any], family: Family) -> Any:
    """The config object of a config.json, whose keys are known by now."""
    from transformers import CONFIG_MAPPING

    kept = {name: value for name, value in given.items() if name not in ("auto_map", "quantization_config")}
    return CONFIG_MAPPING[family.model_type].from_dict({**kept, "architectures": [family.architecture]})


@contextlib.contextmanager
def _without_pickles(files: list[Path], folder: Path) -> Iterator[Path]:
    """A folder with the same weights as safetensors, removed at the end."""
    import torch
    from safetensors.torch import save_file

    copy = folder / "source"
    copy.mkdir()
    try:
        for number, file in enumerate(files):
            try:
                read = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # of the archive, of the pickle, or of what it names
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{KEY}: {file} cannot be read ({type(error).__name__}: {reason}); use a model in safetensors"
                ) from None
            tensors = {name: tensor.contiguous() for name, tensor in read.items() if isinstance(tensor, torch.Tensor)}
            save_file(tensors, copy / f"model-{number + 1:05}-of-{len(files):05}.safetensors", {"format": "pt"})
        shutil.copyfile(files[0].parent / "config.json", copy / "config.json")
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)
