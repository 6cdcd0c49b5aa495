"""The start of a run: a checkpoint that matches its recipe, or random weights if they are intended.

Checked before anything heavy is imported, and before a job is submitted, from a checkpoint's metadata, a tokenizer's
vocabulary and the sizes of the recipe.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_rao.checkpoint.adapters import refuse_adapters, trained_on
from nemo_rao.checkpoint.continuing import START, refuse
from nemo_rao.checkpoint.find import (
    check_checkpoint,
    last_checkpoint,
    refuse_hugging_face,
    resolve_checkpoint,
    stored_tensors,
    token_embeddings,
)
from nemo_rao.checkpoint.run_records import RECIPE, Change, has_results, read_run
from nemo_rao.config.architecture import (
    approximate_parameters,
    architecture_fields,
    network_key,
    num_tokens,
    vocabulary,
)
from nemo_rao.config.checks import made_by
from nemo_rao.config.derived import run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import load_recipe
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry

RANDOM_LIMIT = 1_000_000_000  # parameters; smaller models may be trained from scratch, as in studies and tests
FITTING = "set model.family, model.arch and data.tokenizer to the checkpoint's"
# A tokenizer may rename and add reserved tokens: less than this fraction of a vocabulary.
_OTHER_TOKENS = 0.01
# Embedding rows beyond the tokens that count as padding, if the checkpoint has no tokenizer to compare with.
_PADDING_ROWS = 8192


def check_start(config: RunConfig) -> None:
    """Check the start of a run.

    Raises:
        UserError: random weights for a large model; a checkpoint of another network or tokenizer.
    """
    if not needs_start(config):
        return
    fields, given = architecture_fields(config), config.model.restore_from_path
    preset = fields.get("vocab_size")
    tokens = preset if isinstance(preset, int) else num_tokens(config.data.tokenizer)
    if given is None:
        _check_random(config, approximate_parameters(fields, tokens or 0))
        return
    refuse_hugging_face(given, START)
    if not Path(given).expanduser().is_dir():
        remedy = made_by(given) or "give the directory of a checkpoint"
        raise UserError(f"{START}={given}: no such directory; {remedy}.")
    checkpoint = start_of(config)
    assert checkpoint is not None
    refuse_adapters(checkpoint, START)
    check_checkpoint(
        checkpoint,
        SimpleNamespace(**{name: value if isinstance(value, int) else None for name, value in fields.items()}),
        tokens,
        key=START,
        remedy=FITTING,
        trusted=config.model.allow_pickle,
    )
    check_tokenizer(config, checkpoint, num_tokens(config.data.tokenizer))


def _check_random(config: RunConfig, parameters: int) -> None:
    if parameters <= RANDOM_LIMIT or config.model.allow_random_weights:
        return
    raise UserError(
        f"{START}: is null, so {parameters / 1e9:.1f} billion parameters of {network_key(config)} would start from "
        "random weights. Name the checkpoint to start from (nemo-rao import-hf makes one), or set "
        "model.allow_random_weights=true to train from scratch."
    )


def check_tokenizer(config: RunConfig, checkpoint: Path, tokens: int | None) -> None:
    """Refuse a tokenizer whose ids represent other tokens than the checkpoint's.

    Args:
        tokens: vocabulary size of the recipe's tokenizer; ``None`` if not known yet.

    Raises:
        UserError: names both tokenizers.
    """
    given = Path(config.data.tokenizer or "").expanduser() / "tokenizer.json"
    own = sorted((checkpoint / "context").glob("*/tokenizer.json"))
    remedy = f"use the tokenizer that belongs to {checkpoint}"
    if given.is_file() and len(own) == 1:
        if given.read_bytes() == own[0].read_bytes():
            return
        there, here = vocabulary(own[0]), vocabulary(given)
        other = sum(here.get(token) != number for token, number in there.items())
        if other > max(1, _OTHER_TOKENS * len(there)):
            raise UserError(
                f"data.tokenizer={config.data.tokenizer}: {other} of the {len(there)} tokens of the checkpoint's "
                f"tokenizer ({own[0].parent}) are missing or have other ids. The model was trained with "
                f"data.tokenizer={own[0].parent}."
            )
        return
    rows = token_embeddings(checkpoint, trusted=config.model.allow_pickle)
    if tokens is not None and rows is not None and rows > 2 * tokens and rows - tokens > _PADDING_ROWS:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer}: has {tokens} tokens, but {checkpoint} embeds {rows}; {remedy}."
        )


def describe_start(config: RunConfig, start_from: Path | None) -> str:
    """Describe the start in one line."""
    if start_from is None:
        return f"starting from random weights (trainer.seed={config.trainer.seed}; {START} is null)"
    return f"starting from {start_from}"


def describe_heads(config: RunConfig, objective_config: Any, start_from: Path | None) -> list[str]:
    """Describe each head of the run or of its start in a line: kept, newly initialized, or dropped. Imports megatron.

    Args:
        objective_config: the objective's keys, with values resolved from the data.
    """
    from nemo_rao.mcore.heads import HEADS, SCORE_HEAD, VALUE_HEAD, is_stored

    if start_from is None:
        return []
    tensors = stored_tensors(start_from, trusted=config.model.allow_pickle)
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    needs = registry.get(config.model.objective).needs_of(objective_config)
    outputs = {SCORE_HEAD: needs.scores, VALUE_HEAD: int(needs.values is not None)}
    lines = []
    for name in HEADS:
        wanted, label = outputs[name], name.replace("_", " ")
        stored = next((shape for key, shape in shapes.items() if key.split(".")[-2:] == [name, "weight"]), None)
        if wanted and stored is not None and is_stored(name, (wanted, *stored[1:]), shapes):
            lines.append(f"{label}: kept from the start")
        elif wanted:
            drawn = f"drawn from trainer.seed={config.trainer.seed}" if name == SCORE_HEAD else "at 0"
            start_has = "the start has none" if stored is None else f"the start's has {stored[0]} outputs, not {wanted}"
            lines.append(f"{label}: newly initialized, {drawn} ({start_has})")
        elif stored is not None:
            lines.append(f"{label}: dropped, because {config.model.objective} has none")
    return lines


def start_of(config: RunConfig) -> Path | None:
    """Return the checkpoint that a run starts from, or ``None``; when resuming, the one that it has started from.

    A run named as the start may have continued since, to checkpoints that this run has never used.

    Raises:
        UserError: ``model.restore_from_path`` is not a checkpoint, or not the one that the run started from.
    """
    folder, given = run_dir(config), config.model.restore_from_path
    record = read_run(folder)
    if not has_results(folder) or "start_from" not in record:
        return None if given is None else resolve_checkpoint(given, START)
    recorded = None if record["start_from"] is None else Path(record["start_from"])
    if _same_place(load_recipe(folder / RECIPE).model.restore_from_path, given):
        return recorded
    resolved = None if given is None else resolve_checkpoint(given, START)
    if resolved is not None and trained_on(last_checkpoint(folder), resolved):
        return resolved  # a copy of the weights below this run's adapters
    if resolved != recorded:
        change = Change(START, recorded, resolved, keeps_numbers=False, loads=config.model.peft.scheme == "none")
        refuse([change], config, folder)
    return recorded


def needs_start(config: RunConfig) -> bool:
    """Whether weights are read from the start: a run's checkpoints hold all weights except those under adapters."""
    return config.model.peft.scheme != "none" or not has_results(run_dir(config))


def _same_place(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one is other
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
