"""Checkpoints of LoRA runs: only adapters, with a record of the checkpoint whose weights they modify.

    weights/adapter_metadata.json    model_ckpt_path   directory of the base's checkpoint
                                     model_digest      digest of its weights; absent in checkpoints of earlier versions

NeMo's own record is wrong after a resume: it names the adapters that the run resumed from. Such records are followed
to the base.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.find import resolve_checkpoint, stored_tensors
from nemo_rao.checkpoint.layout import is_checkpoint, names_of_model, weights_of
from nemo_rao.checkpoint.pickles import read_metadata
from nemo_rao.config.lora_targets import KEY, SPLIT, adapted, linear_layers, lora_targets, splits
from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import load_recipe
from nemo_rao.errors import UserError

METADATA = "adapter_metadata.json"
_LAYERS, _INTO = "decoder.layers.", ".linear_in.weight"
_SAMPLE = 1 << 12  # bytes read at each of these offsets in a stored tensor, after its header
_SAMPLED_AT = (0.25, 0.5, 0.75)


def holds_adapters(checkpoint: Path) -> bool:
    """Whether a checkpoint holds only adapters."""
    return (weights_of(checkpoint) / METADATA).is_file()


def refuse_adapters(checkpoint: Path, key: str) -> None:
    """Refuse a checkpoint of adapters where a whole model is needed.

    Raises:
        UserError: it holds only adapters.
    """
    if holds_adapters(checkpoint):
        raise UserError(
            f"{key}: {checkpoint} holds only adapters (a run with model.peft.scheme), not a whole model. Merge them "
            f"first: nemo-rao export-hf {checkpoint} MERGED, then nemo-rao import-hf MERGED WHOLE, and use WHOLE."
        )


def base_of_adapters(checkpoint: Path, key: str, base: str | None = None) -> Path:
    """Return the checkpoint whose weights the adapters modify.

    Args:
        checkpoint: checkpoint of the adapters.
        key: key or option by which the user named it, for messages.
        base: where the base is now, if the user states it; ``None``: as recorded.

    Raises:
        UserError: the base is unknown or missing, or its weights are not those that the adapters were trained on.
    """
    recorded = _record(checkpoint, key)
    digest = recorded.get("model_digest")
    found = _follow(checkpoint, key) if base is None else resolve_checkpoint(base, "--base")
    refuse_adapters(found, key if base is None else "--base")
    if digest is not None and digest_of_weights(found) != digest:
        raise UserError(
            f"{key}: the adapters of {checkpoint} were trained on {recorded['model_ckpt_path']}, and {found} has other "
            "weights. Name a copy of that checkpoint."
        )
    return found


def _follow(checkpoint: Path, key: str) -> Path:
    """Follow adapters that name adapters as their base, as older versions wrote on resume, to the actual base."""
    seen, at = {checkpoint.resolve()}, checkpoint
    while True:
        path = Path(_record(at, key)["model_ckpt_path"])
        path = path.parent if path.name == "weights" else path
        if is_checkpoint(path):
            if not holds_adapters(path):
                return path
            if path.resolve() not in seen:
                at = path
                seen.add(path.resolve())
                continue
        if path.parent == at.parent and (start := _start_of_run(at)) is not None:
            return start  # an earlier checkpoint of this run, since removed; its recipe still has the start
        raise UserError(
            f"{key}: the adapters of {checkpoint} were trained on {path}, which no longer exists. Restore it, or name "
            "a copy (--base of export-hf, model.restore_from_path of a run)."
        )


def _start_of_run(checkpoint: Path) -> Path | None:
    recipe = checkpoint.parent.parent / "recipe.yaml"
    path = load_recipe(recipe).model.restore_from_path if recipe.is_file() else None
    return None if path is None else resolve_checkpoint(path, f"{recipe}: model.restore_from_path")


def _record(checkpoint: Path, key: str) -> dict[str, Any]:
    file = weights_of(checkpoint) / METADATA
    try:
        record = json.loads(file.read_text())
        if not isinstance(record["model_ckpt_path"], str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{key}: {file} does not name the model of the adapters. Restore that file.") from None
    return record


def digest_of_weights(checkpoint: Path) -> str:
    """Return a digest of the model in a checkpoint, independent of its path.

    It covers name, size and samples of the bytes of each stored part of each tensor: models differ in all of their
    matrices, or in whole matrices, and reading a large model completely would take minutes.
    """
    weights, metadata = weights_of(checkpoint), read_metadata(checkpoint)
    of_model = names_of_model(metadata.state_dict_metadata)
    parts = [
        (location.relative_path, location.offset, location.length, index.fqn)
        for index, location in metadata.storage_data.items()
        if index.fqn in of_model
    ]
    digest = hashlib.sha256()
    for name, of_file in itertools.groupby(sorted(parts), key=operator.itemgetter(0)):
        with (weights / name).open("rb") as file:
            for _, offset, length, tensor in of_file:
                digest.update(f"{tensor}|{length}|".encode())
                for fraction in _SAMPLED_AT:
                    file.seek(offset + int(length * fraction))
                    digest.update(file.read(min(_SAMPLE, length)))
    return digest.hexdigest()[:16]


def trained_on(checkpoint: Path | None, base: Path) -> bool:
    """Whether a checkpoint holds adapters that were trained on the weights of ``base``, at any path."""
    if checkpoint is None or not holds_adapters(checkpoint):
        return False
    return _record(checkpoint, str(checkpoint)).get("model_digest") == digest_of_weights(base)


def check_scheme(config: RunConfig, checkpoint: Path) -> None:
    """Refuse to resume a run of adapters without them, or a run of all weights with them.

    Raises:
        UserError: names the key.
    """
    scheme = config.model.peft.scheme
    if holds_adapters(checkpoint) == (scheme == "none"):
        holds = "only adapters" if scheme == "none" else "every weight of a model"
        raise UserError(
            f"model.peft.scheme={scheme}: exp_manager.name={config.exp_manager.name} would resume from {checkpoint}, "
            f"which holds {holds}. Set model.peft.scheme {'back' if scheme == 'none' else 'to none'}, or use another "
            "exp_manager.name."
        )


def base_on_resume(checkpoint: Path, start: Path, key: str) -> Path:
    """Return the base on which adapters are trained further: the one that they were first trained on.

    Args:
        checkpoint: checkpoint of the adapters.
        start: current target of ``model.restore_from_path``. A run that is named there may have continued since.
        key: for messages.

    Raises:
        UserError: neither ``start`` nor the recorded checkpoint has the weights that were trained on.
    """
    digest = _record(checkpoint, key).get("model_digest")
    if digest is None:
        try:
            return _follow(checkpoint, key)
        except UserError:
            return start  # nothing to compare it with
    if digest_of_weights(start) == digest:
        return start
    return base_of_adapters(checkpoint, key)


def stored_adapters(shapes: Mapping[str, Sequence[int]], num_layers: int) -> dict[str, int]:
    """Map the name of each linear layer, or part of one, that has an adapter to the adapter's rank.

    Args:
        shapes: shapes of a checkpoint's tensors, by name without ``module.``; layers stacked in one tensor or separate.
    """
    found: dict[str, int] = {}
    for full_name, shape in shapes.items():
        if not full_name.endswith(_INTO):
            continue
        name = _adapted_by(full_name.removesuffix(_INTO))
        rest = name.removeprefix(_LAYERS)
        if rest == name or rest[:1].isdigit():
            found[name] = shape[0]
        else:
            found |= {f"{_LAYERS}{number}.{rest}": shape[1] for number in range(num_layers)}
    return found


def _adapted_by(adapter: str) -> str:
    """Map ``....linear_qkv.adapter`` to ``....linear_qkv``, ``....linear_qkv.adapter.adapter_k`` to ``...linear_k``."""
    name, _, part = adapter.removesuffix(".adapter").partition(".adapter.adapter_")
    before, dot, layer = name.rpartition(".")
    return before + dot + next((one for one in SPLIT.get(layer, ()) if part and one.endswith(f"_{part}")), layer)


def check_resumed_adapters(config: RunConfig, checkpoint: Path, num_layers: int, *, experts: bool) -> None:
    """Check that the adapters of a checkpoint are those of the run that resumes from it.

    Raises:
        UserError: other layers have adapters, or adapters have another rank.
    """
    if config.model.peft.scheme == "none":
        return
    tensors = stored_tensors(checkpoint, trusted=config.model.allow_pickle)
    stored = stored_adapters({name: shape for name, (shape, _) in tensors.items()}, num_layers)
    wanted = adapted(lora_targets(config), linear_layers(num_layers, experts=experts, split=splits(config)))
    run = f"exp_manager.name={config.exp_manager.name} would resume from {checkpoint}"
    remedy = "restore its old value, or use another exp_manager.name"
    if more := [name for name in wanted if name not in stored]:
        raise UserError(f"{KEY}: {run}, which has no adapter of {more[0]} ({len(more)} such layers); {remedy}.")
    if fewer := [name for name in stored if name not in wanted]:
        raise UserError(f"{KEY}: {run}, which also has an adapter of {fewer[0]} ({len(fewer)} such layers); {remedy}.")
    if other := sorted(set(stored.values()) - {config.model.peft.lora.dim}):
        raise UserError(
            f"model.peft.lora.dim={config.model.peft.lora.dim}: {run}, whose adapters have dim {other[0]}; {remedy}."
        )
