"""The report of one run: settings, data, curves of explicit and fitted reward, samples if there are any."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.continuing import flat_keys
from nemo_rao.checkpoint.run_records import CHANGES, RECIPE, read_data_record, read_run, versions_of
from nemo_rao.config.recipe_text import shown as shown_key
from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import load_recipe
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry
from nemo_rao.runtime.curves import PANELS, is_dashed
from nemo_rao.runtime.files import read_json_lines
from nemo_rao.runtime.metrics_file import read_metrics
from nemo_rao.study.document import Block, Code, Document, Figure, Heading, Table, Text
from nemo_rao.study.figures import Panel, curves
from nemo_rao.study.formatting import shown
from nemo_rao.study.measures import Records, logged, series

SAMPLES = "samples.jsonl"
MAX_SAMPLES = 4  # prompts of the last rollout that is kept
MAX_CHARACTERS = 2000  # shown of a sample


def run_document(folder: Path) -> Document:
    """Build the report of the run in ``folder``.

    Raises:
        UserError: it is not a run's directory.
    """
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder}: has no {RECIPE}, so it is not a run's directory. Give one, such as runs/gpt_rao.")
    config, records = load_recipe(folder / RECIPE), read_metrics(folder / "metrics.jsonl")
    blocks = [*_setup(folder, config), *_data(folder), *_metrics(records), *_curves(records)]
    blocks += [*_samples(folder), *_settings(config), *_changes(folder)]
    return Document(f"Run {config.exp_manager.name}", blocks)


def _setup(folder: Path, config: RunConfig) -> Iterator[Block]:
    record = read_run(folder)
    planned, finished = record.get("max_steps"), record.get("finished_at")
    state = f"finished after {finished} steps" if finished is not None else "not finished"
    start = record.get("start_from") or f"random weights (trainer.seed={config.trainer.seed})"
    yield Text(
        f"Objective {config.model.objective}, {state} of {planned} planned, started from {start}, on the engine "
        f"{record.get('engine', 'that is not recorded')}, by {' and '.join(versions_of(folder))}."
    )


def _data(folder: Path) -> Iterator[Block]:
    if not (record := read_data_record(folder)):
        return
    yield Heading("Data")
    rows = [[name, f"{of['num_prompts']:,}", of.get("report", "")] for name, of in record.items()]
    yield Table(["data set", "prompts", "what was kept and dropped"], rows, num_labels=3)


def _metrics(records: Records) -> Iterator[Block]:
    """Tabulate first and last values of the held-out metrics, or of training if there is no held-out data."""
    names = sorted(name for name in logged([records]) if name.startswith("val/"))
    names = names or sorted(name for name in logged([records]) if name not in ("step", "lr"))
    if not names:
        yield Text("No step has been logged yet.")
        return
    rows = []
    for name in names:
        steps, values = series(records, name)
        change = shown(values[-1] - values[0]) if len(values) > 1 else ""
        rows.append([name, shown(values[0]), shown(values[-1]), change, f"{steps[-1]:g}"])
    yield Heading("Metrics")
    yield Table(["metric", "first", "last", "change", "at step"], rows)


def panels(records: Records) -> list[Panel]:
    """Build the panels of the logged metrics."""
    found = []
    for title, unit, metrics in PANELS:
        lines = {label: [line] for name, label in metrics if (line := series(records, name))[0]}
        if lines:
            found.append(Panel(title, unit, lines, frozenset(filter(is_dashed, lines))))
    return found


def _curves(records: Records) -> Iterator[Block]:
    if found := panels(records):
        yield Heading("Curves")
        for panel in range(0, len(found), 3):
            name = f"curves-{panel // 3 + 1}"
            group = found[panel : panel + 3]
            yield Figure(name, curves(group, name, shares_legend=False), ", ".join(one.title for one in group))


def _samples(folder: Path) -> Iterator[Block]:
    """Show samples of the last step that kept some."""
    if not (records := read_json_lines(folder / SAMPLES)):
        return
    last = records[-1]["step"]
    yield Heading(f"Samples of step {last}")
    for record in [record for record in records if record["step"] == last][:MAX_SAMPLES]:
        prompt = record["prompt"]
        text = prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
        yield Code(_cut(text))
        rows = [
            [
                shown(response["reward"]),
                shown(response.get("advantage")),
                f"{response['tokens']:,}{' (cut)' if response['truncated'] else ''}",
                _cut(response["content"]),
            ]
            for response in record["responses"]
        ]
        yield Table(["reward", "advantage", "tokens", "response"], rows, num_labels=4)


def _settings(config: RunConfig) -> Iterator[Block]:
    unread = tuple(f"model.{name}." for name in registry.OBJECTIVES if name != config.model.objective)
    usual = flat_keys(dataclasses.asdict(RunConfig()))
    own = {key: value for key, value in flat_keys(dataclasses.asdict(config)).items() if not key.startswith(unread)}
    chosen = {key: value for key, value in own.items() if usual.get(key) != value}
    yield Heading("Settings")
    yield _keys(chosen, None)
    others = {key: value for key, value in own.items() if key not in chosen}
    yield _keys(others, f"{len(others)} keys with their defaults")


def _keys(values: Mapping[str, Any], folded: str | None) -> Table:
    rows = [[key, shown_key(value)] for key, value in values.items()]
    return Table(["key", "value"], rows, num_labels=2, folded=folded)


def _changes(folder: Path) -> Iterator[Block]:
    if not (lines := read_json_lines(folder / CHANGES)):
        return
    yield Heading("Changes between starts")
    rows = [
        [str(line["step"]), change["key"], str(change["old"]), str(change["new"])]
        for line in lines
        for change in line["changes"]
    ]
    yield Table(["from step", "key", "before", "after"], rows, num_labels=4)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} … ({len(text):,} characters)"
