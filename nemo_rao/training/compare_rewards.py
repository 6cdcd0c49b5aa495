"""``nemo-rao compare-rewards``: which reward ranks held-out pairs best; Table 1 of the RAO paper.

    method       reward of a response y                                          starts from
    rm_base      s(y), the score of a Bradley-Terry reward model (rm)            the base model
    rm_sft       the same                                                        the fine-tuned model
    dpo_sft      beta * (logp(y) - logp_ref(y)), a DPO policy's implicit reward  the fine-tuned model, its reference

Each is trained on a small and on a large part of one preference set, and measured on the same held-out pairs. With
m = reward of the chosen response - reward of the rejected one and p = sigmoid(m), the means over held-out pairs:

    loss        -log p, nats; log 2 for an uninformative reward
    accuracy    1 where m > 0; ties count as wrong
    brier       (1 - p)^2; 0.25 for an uninformative reward

These are ``val/rewards/*`` of a run's last validation (:mod:`nemo_rao.objectives.metrics`), after its last step.

**Choices.** Every row uses the loss of the formula above: ``val/loss`` would add the reward model's centering and
margin, and DPO's label smoothing. DPO's reward uses the beta it was trained with; another one would change its loss,
not its accuracy. No step is selected on the held-out pairs: the last one counts. The small part is drawn at random by
``data.seed``, is the same for every method, and is a subset of every larger one. A prompt gives one pair: of more than
two responses the best and the worst (``data.responses``), in training and among the held-out pairs.

    plan: recipes gpt_rm and gpt_dpo, a PlannedRun for each method and size -> check -> run_comparison: data and
    checkpoints of all runs checked -> several_runs.train_runs -> one row per run -> table, comparison.json and .md

Running the same command again trains what is not finished.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.adapters import refuse_adapters
from nemo_rao.checkpoint.find import resolve_checkpoint
from nemo_rao.checkpoint.run_records import DATA, read_data_record
from nemo_rao.config.checks import check_keys_are_read
from nemo_rao.config.compose import compose
from nemo_rao.config.derived import objective_config, run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError, errors_at
from nemo_rao.runtime.metrics_file import read_metrics
from nemo_rao.training.several_runs import (
    PlannedRun,
    State,
    check_runs,
    finished_runs,
    in_child,
    print_table,
    train_runs,
    write_results,
)

RANDOM = "random"  # instead of a base model: random weights from trainer.seed
SMALL_AND_LARGE = ("10000", "all")  # as in the paper

# Keys that the command sets itself -> what to give instead.
SET_HERE = {
    "exp_manager.exp_dir": "give --out",
    "exp_manager.name": "remove it: runs are named by method and size",
    "model.objective": "remove it: the method sets it",
    "model.restore_from_path": "give --base and --sft",
    "data.num_prompts": "give --pairs",
}

# Column -> metric of the validation.
FIGURES = {"loss": "val/rewards/log_loss", "accuracy": "val/rewards/accuracies", "brier": "val/rewards/brier"}


@dataclass(frozen=True)
class Method:
    """A method of the comparison, with one row of the table per size.

    Attributes:
        name: prefix of its runs' names.
        recipe, objective: the recipe and the objective that are trained.
        start: "base" or "sft".
        label: label in the table; ``{beta}`` is replaced by the run's beta.
    """

    name: str
    recipe: str
    objective: str
    start: str
    label: str


METHODS = (
    Method("rm_base", "gpt_rm", "rm", "base", "Bradley-Terry reward model"),
    Method("rm_sft", "gpt_rm", "rm", "sft", "Bradley-Terry reward model"),
    Method("dpo_sft", "gpt_dpo", "dpo", "sft", "implicit reward of DPO, β = {beta:g}"),
)


@dataclass(frozen=True)
class Asked:
    """The arguments of the command.

    Attributes:
        base, sft: checkpoints or directories of runs; ``base`` may be :data:`RANDOM`.
        pairs: numbers of training pairs, or "all".
        out: directory of the runs and of the table.
        overrides: ``key=value`` overrides of every run.
        of_objective: objective -> ``key=value`` overrides of its runs, applied after the common ones.
        config_dir: see :func:`nemo_rao.config.compose.compose`.
    """

    base: str
    sft: str
    pairs: Sequence[str]
    out: str
    overrides: Sequence[str]
    of_objective: Mapping[str, Sequence[str]]
    config_dir: str | None = None


@dataclass(frozen=True)
class Comparison:
    """All runs of the comparison, and where the table is written.

    Attributes:
        folder: directory of the runs, ``comparison.json`` and ``comparison.md``.
        runs: the runs, in the order in which they are trained.
        methods: the method of each run.
    """

    folder: Path
    runs: tuple[PlannedRun, ...]
    methods: tuple[Method, ...]


def main(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    asked = Asked(
        base=arguments.base,
        sft=arguments.sft,
        pairs=arguments.pairs or SMALL_AND_LARGE,
        out=arguments.out,
        overrides=arguments.overrides,
        of_objective={"rm": arguments.rm, "dpo": arguments.dpo},
        config_dir=arguments.config_dir,
    )
    comparison = plan(asked)
    check(comparison)
    return run_comparison(comparison)


def _start(path: str, option: str) -> str:
    checkpoint = resolve_checkpoint(path, option)
    refuse_adapters(checkpoint, option)
    return str(checkpoint)


def plan(asked: Asked) -> Comparison:
    """Compose all runs. Reads recipes and the names of checkpoints, but no data.

    Raises:
        UserError: an option or a key cannot be used, or the runs would be measured on different pairs.
    """
    sizes = [_size(given) for given in asked.pairs]
    for given in {given for given in asked.pairs if sizes.count(_size(given)) > 1}:
        raise UserError(f"--pairs {given}: is given twice. Give each size once.")
    for text in (*asked.overrides, *(text for own in asked.of_objective.values() for text in own)):
        if (remedy := SET_HERE.get(key := text.lstrip("+").partition("=")[0])) is not None:
            raise UserError(f"{text}: compare-rewards sets {key} itself. Instead, {remedy}.")
    starts = {"sft": _start(asked.sft, "--sft")}
    starts["base"] = "null" if asked.base == RANDOM else _start(asked.base, "--base")
    runs, methods = [], []
    for size in sizes:
        for method in METHODS:
            own = tuple(asked.of_objective.get(method.objective, ()))
            name = f"{method.name}-{size or 'all'}"
            set_here = (
                f"exp_manager.exp_dir={asked.out}",
                f"exp_manager.name={name}",
                f"model.objective={method.objective}",
                f"model.restore_from_path={starts[method.start]}",
                f"data.num_prompts={size or 'null'}",
            )
            with errors_at(f"--{method.objective}" if own else ""):
                config = compose(method.recipe, [*asked.overrides, *own, *set_here], asked.config_dir)
                check_keys_are_read(own, config)
            runs.append(PlannedRun(name, name, config))
            methods.append(method)
    _check_same_pairs([run.config for run in runs])
    return Comparison(run_dir(runs[0].config).parent, tuple(runs), tuple(methods))


def check(comparison: Comparison) -> None:
    """Check every run as far as recipes and file names allow. Nothing is written.

    Raises:
        UserError: on the first mistake.
    """
    check_runs(comparison.runs, another="--out")


def run_comparison(comparison: Comparison) -> int:
    """Train the checked runs and print the table.

    Returns:
        the exit code: 0, or 1 if a run failed.

    Raises:
        UserError: the data or a checkpoint does not fit; nothing has been trained then.
        RankFailure: under SLURM or torchrun, a run failed.
    """
    from nemo_rao.runtime.console import say

    runs, rows = comparison.runs, []
    say(f"checking data and checkpoints of {len(runs)} runs")
    # In a child process: a tokenizer that was used before a fork is slow in the forked processes.
    in_child(_check_data, runs, name="the check of data and checkpoints")
    for method, run, state in zip(comparison.methods, runs, train_runs(runs), strict=True):
        rows.append(_row(method, run, state))
        _write(comparison.folder, rows)
    _print(comparison.folder, rows)
    return 1 if any(row["state"] == "failed" for row in rows) else 0


# ----------------------------------------------------------------------------------------------------------- checks


def _size(given: str) -> int | None:
    """Number of pairs to train on; ``None``: all."""
    if given == "all":
        return None
    if given.isascii() and given.isdigit() and int(given) > 0:
        return int(given)
    raise UserError(f"--pairs {given}: must be a positive number of pairs, or all.")


def _check_same_pairs(configs: Sequence[RunConfig]) -> None:
    """Check that all runs use the held-out pairs of the first, and draw the same prompts from the data."""
    first = configs[0]
    for config in configs:
        if config.data.validation_path is None:
            raise UserError(
                "data.validation_path: is not set. Add data.validation_path=FILE.jsonl, the held-out pairs on which "
                "all rewards are compared."
            )
        if config.data.responses == "all":
            raise UserError(
                "data.responses=all: is not supported here, because each prompt must give one pair. Set it to "
                "best_worst or best_random."
            )
        for key, one, other in (
            ("model.seq_length", first.model.seq_length, config.model.seq_length),
            *(
                (f"data.{name}", one, vars(config.data)[name])
                for name, one in vars(first.data).items()
                if name != "num_prompts"
            ),
        ):
            if one != other:
                raise UserError(
                    f"{key}: is {one} for {first.model.objective}, but {other} for {config.model.objective}, and all "
                    "rewards must be compared on the same pairs. Set it without --rm or --dpo."
                )


def _check_data(runs: Sequence[PlannedRun]) -> None:
    """Check what only the data and the checkpoints show, for all runs that are still to be trained.

    A finished run must have been measured on the same pairs as the others will be.
    """
    from nemo_rao.runtime.console import quiet_third_parties
    from nemo_rao.training.devices import check_ranks_started, select_device
    from nemo_rao.training.loading import LoadedData, data_identity, load_data
    from nemo_rao.training.prepare import prepare

    quiet_third_parties()
    held_out: dict[str, str] = {}  # fingerprint -> the first run with it
    loaded: dict[str, LoadedData] = {}
    finished = finished_runs(runs, loaded, another="--out")
    for run in sorted(runs, key=lambda run: run.name not in finished):
        with errors_at(run.name):
            if run.name in finished:
                fingerprint = _data_record(run.config)["validation"]["fingerprint"]
            else:
                check_ranks_started(run.config)
                select_device(run.config)
                identity = data_identity(run.config)
                if identity not in loaded:
                    loaded[identity] = load_data(run.config)
                prepared = prepare(run.config, loaded[identity])
                assert prepared.validation is not None
                fingerprint = prepared.validation.fingerprint()
            held_out.setdefault(fingerprint, run.name)
        if len(held_out) > 1:
            raise UserError(
                f"data.validation_path={run.config.data.validation_path}: {next(iter(held_out.values()))} was measured "
                f"on other held-out pairs than {run.name} would be. Restore the previous file, or give another --out."
            )


def _data_record(config: RunConfig) -> Mapping[str, Any]:
    """The data record that a run has written."""
    if record := read_data_record(run_dir(config)):
        return record
    raise UserError(f"{run_dir(config) / DATA}: is missing. Remove {run_dir(config)} to train the run again.")


# ---------------------------------------------------------------------------------------------------------- results


def _row(method: Method, run: PlannedRun, state: State) -> dict[str, Any]:
    """A run's row of the table; a failed run has no figures."""
    label = method.label.format(**vars(objective_config(run.config)))
    row: dict[str, Any] = {
        "run": run.name,
        "folder": str(run_dir(run.config)),
        "reward": label,
        "start": method.start if run.config.model.restore_from_path is not None else RANDOM,
        "state": state,
    }
    names = ("pairs", "held_out_pairs", "steps", *FIGURES)
    if state == "failed":
        return row | dict.fromkeys(names)
    record = _data_record(run.config)
    counts = {
        "pairs": record["training"]["num_prompts"],
        "held_out_pairs": record["validation"]["num_prompts"],
    }
    last = [line for line in read_metrics(run_dir(run.config) / "metrics.jsonl") if "val/loss" in line][-1]
    return row | counts | {"steps": last["step"]} | {name: last[metric] for name, metric in FIGURES.items()}


def _write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_results(folder / "comparison.json", json.dumps({"rows": rows}, indent=2) + "\n")
    header, *lines = _cells(rows)
    ruled = [header, ["---", "---", *["---:"] * (len(header) - 2)], *lines]
    write_results(folder / "comparison.md", "".join(f"| {' | '.join(line)} |\n" for line in ruled))


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of the table as text, header first."""
    cells = [["reward", "trained from", "pairs", "steps", "held-out loss", "held-out accuracy", "Brier score"]]
    for row in rows:
        numbers = ["", row["state"], *[""] * len(FIGURES)]
        if row["state"] == "finished":
            counts = [f"{row[name]:,}" for name in ("pairs", "steps")]
            numbers = [*counts, *(f"{row[name]:.4f}" for name in FIGURES)]
        cells.append([row["reward"], row["start"], *numbers])
    return cells


def _print(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    from nemo_rao.runtime.console import say

    held_out = next((row["held_out_pairs"] for row in rows if row["held_out_pairs"] is not None), None)
    title = f"rewards on {held_out:,} held-out pairs" if held_out is not None else "no run has finished"
    table = Table(title=title, title_justify="left")
    header, *lines = _cells(rows)
    for number, label in enumerate(header):
        table.add_column(label, justify="left" if number < 2 else "right")
    for number, line in enumerate(lines, start=1):
        table.add_row(*line, end_section=number % len(METHODS) == 0)
    print_table(table)
    say(f"also written to: {folder / 'comparison.json'}, {folder / 'comparison.md'}")
