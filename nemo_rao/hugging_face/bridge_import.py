"""Import with Megatron-Bridge, the counterpart of NeMo's connectors.

    *.safetensors  --engines/bridge/hugging_face.py-->  weights/

Bridge builds the network described by :mod:`nemo_rao.hugging_face.config_keys`, not the installed transformers'
interpretation of the whole config.json.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_rao.config.families import BRIDGE_ROPE_SCALING
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.bridge_conversion import bridge_of_one_rank
from nemo_rao.hugging_face.families import Family
from nemo_rao.hugging_face.network import network_fields, transformers_config
from nemo_rao.hugging_face.source import KEY, Source
from nemo_rao.hugging_face.source_weights import (
    DTYPES,
    EMBEDDINGS,
    OUTPUT,
    check_names,
    check_tensors,
    check_tie,
    read_pickle,
)
from nemo_rao.model_files.weights import read_headers
from nemo_rao.runtime.console import say


def check_scaling(config: Any, family: Family, folder: Path) -> None:
    """Check that Bridge supports the rotary scaling of a model.

    Args:
        config: from :func:`nemo_rao.hugging_face.config_keys.read_config`.

    Raises:
        UserError: it does not; the message names the key.
    """
    if family.rope_type != "llama3" or not config.rope_scaling:
        return
    for name, value in BRIDGE_ROPE_SCALING.items():
        if config.rope_scaling[name] != value:
            raise UserError(
                f"{KEY}: {folder / 'config.json'}: rope_scaling.{name} ({config.rope_scaling[name]}) cannot be "
                f"imported: Megatron-Bridge supports only {value}, the value of published models"
            )


def import_weights(source: Source, files: Sequence[Path], folder: Path) -> None:
    """Write ``folder/weights``, a checkpoint of the model.

    Args:
        files: the weights.

    Raises:
        UserError: tensors are missing, left over, of another shape, or of a dtype that cannot be imported.
    """
    location = f"{KEY}: {source.folder}"
    family, config = source.family, source.config
    fields = {**family.network.fields, **network_fields(config, family)}
    made = transformers_config(
        fields, family, vocab_size=config.vocab_size, seq_length=config.max_position_embeddings, location=location
    )
    import torch

    with contextlib.ExitStack() as stack:
        whole = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        made.save_pretrained(whole)
        tensors = _tensors_in(whole, files)
        check_tensors(tensors, None, source.folder)
        # All in the widest dtype among them, so that nothing is rounded.
        stored = {dtype for dtype, _ in tensors.values()}
        dtype = vars(torch)[DTYPES[stored.pop()]] if len(stored) == 1 else torch.float32
        if config.tie_word_embeddings and {EMBEDDINGS, OUTPUT} <= tensors.keys():
            check_tie(_read(whole, (EMBEDDINGS, OUTPUT)), source.folder)
        stack.enter_context(bridge_of_one_rank())
        from nemo_rao.engines.bridge.hugging_face import Conversion, save_checkpoint

        conversion = Conversion(made, location)
        say("reading and converting the weights")
        chunks = conversion.build(dtype)
        check_names(tensors, sorted(conversion.names(chunks, whole)), location)
        conversion.load(chunks, whole)
        say("writing the checkpoint")
        save_checkpoint(chunks, folder)


def _tensors_in(folder: Path, files: Sequence[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Fill a directory with the weights as safetensors. Returns dtype and shape of each tensor.

    A new directory is needed because Bridge reads all safetensors in a directory, also unrelated ones.
    """
    from safetensors.torch import save_file

    for number, file in enumerate(files):
        copy = folder / f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        if file.suffix == ".safetensors":
            os.symlink(file.resolve(), copy)
        else:
            tensors = {name: tensor.clone().contiguous() for name, tensor in read_pickle(file).items()}
            save_file(tensors, copy, {"format": "pt"})
    headers = read_headers(folder, sorted(folder.glob("*.safetensors")), KEY)
    return {name: one for header in headers.values() for name, one in header.tensors.items()}


def _read(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in names if name in opened.keys()}  # noqa: SIM118
    return found
