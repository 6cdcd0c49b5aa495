"""Run a study: every step once, in order. A failure stops only the steps that depend on it.

    Plan -> data, runs -> policies sampled and evaluated -> results.json -> report.md, report.html

The same command resumes: finished runs, data and samples are left unchanged, an interrupted run resumes from its
last checkpoint. Runs share one ``exp_dir`` and therefore the reference pass over the start's log-probabilities.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_rao.config.derived import run_dir
from nemo_rao.errors import RankFailure, UserError, errors_at
from nemo_rao.study.made_data import check_data, make_data
from nemo_rao.study.planned import Plan, PlannedData, StudyRun
from nemo_rao.study.policies import Policy, check_samples, check_tasks, examine, is_examined
from nemo_rao.training.checks import check_run
from nemo_rao.training.several_runs import finished_runs, in_child, load_engine, train_one

MAX_REASON = 300  # characters


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step.

    Attributes:
        state: "finished" or "failed".
        reason: reason of a failure, in one line.
    """

    state: str
    reason: str = ""


def check_steps(made: Plan) -> None:
    """Check data to be made, samples and tasks; runs are checked by :func:`nemo_rao.study.plan.check`.

    Raises:
        UserError: on the first mistake, with the study file and the key.
    """
    study = made.study
    with errors_at(str(study.path)):
        for step in made.steps:
            if isinstance(step, PlannedData):
                check_data(step, ready=not step.needs)
        if study.samples is not None:
            prompts, scorer = _resolved_samples(made)
            check_samples(study.samples, prompts, scorer, ready=prompts == study.samples.prompts)
        if study.tasks is not None:
            check_tasks(study.tasks)


def run_steps(made: Plan) -> dict[str, Outcome]:
    """Make, train, sample and evaluate what is not finished, and return the outcome of each step.

    Policies are steps, too, named by :func:`policies_of`.

    Raises:
        UserError: the data of a finished run has changed.
    """
    from nemo_rao.runtime.console import quiet_third_parties, say

    quiet_third_parties()
    there = [run for run in made.runs if (run_dir(run.config) / "run.json").exists()]
    with errors_at(str(made.study.path)):
        finished = in_child(finished_runs, there, name="the check of finished runs") if there else set()
    is_loaded = False
    outcomes: dict[str, Outcome] = {}
    number = 0
    for step in made.steps:
        number += isinstance(step, StudyRun)
        label = f"[{number}/{len(made.runs)}] {step.name}" if isinstance(step, StudyRun) else f"data {step.name}"
        if failed := [need for need in step.needs if outcomes[need].state == "failed"]:
            outcomes[step.name] = Outcome("failed", f"needs {failed[0]}, which failed")
        elif isinstance(step, PlannedData):
            say(f"\n{label}: {step.path}")
            outcomes[step.name] = _outcome(in_child, make_data, step, name=f"data {step.name}")
        elif step.name in finished:
            say(f"{label}: finished before")
            outcomes[step.name] = Outcome("finished")
        else:
            say(f"\n{label}")
            try:
                check_run(step.config)  # its data and its start exist now
                if not is_loaded:
                    load_engine([run.config for run in made.runs])
                    is_loaded = True
            except UserError as error:
                outcomes[step.name] = _failed(error)
            else:
                outcomes[step.name] = _outcome(train_one, step)
        if outcomes[step.name].state == "failed":
            say(f"{step.name} failed: {outcomes[step.name].reason}")
    outcomes |= _examine_all(made, outcomes, is_loaded=is_loaded)
    return outcomes


def policies_of(made: Plan) -> dict[str, Policy]:
    """Map step names (``policy NAME``) to policies to sample or evaluate: compared runs, and their starts."""
    study = made.study
    if study.samples is None and study.tasks is None:
        return {}
    found = [Policy(run.name, run_dir(run.config)) for arm in made.compared for run in made.runs_of(arm)]
    against = [] if study.samples is None else study.samples.against
    for name in against:
        if name == "start":
            found += [
                policy for arm in made.compared for run in made.runs_of(arm) for policy in [start_policy(made, run)]
            ]
        elif name in study.arms:
            found += [Policy(run.name, run_dir(run.config)) for run in made.runs_of(name)]
    return {f"policy {policy.name}": policy for policy in found}


def start_policy(made: Plan, run: StudyRun) -> Policy:
    """Return the policy that a compared run starts from."""
    if run.start is not None:
        return Policy(run.start, run_dir(next(one for one in made.runs if one.name == run.start).config))
    outside = [made.runs_of(arm)[0] for arm in made.compared]  # checkpoints that are not runs of this study
    checkpoints = {one.arm: one.config.model.restore_from_path for one in outside if one.start is None}
    start = run.config.model.restore_from_path
    assert start is not None, "samples.against: start is refused for arms without one"
    first_arm = next(arm for arm, checkpoint in checkpoints.items() if checkpoint == start)
    name = "start" if len(set(checkpoints.values())) == 1 else f"start@{first_arm}"
    return Policy(name, Path(start).expanduser())


def _examine_all(made: Plan, outcomes: Mapping[str, Outcome], *, is_loaded: bool) -> dict[str, Outcome]:
    from nemo_rao.runtime.console import say

    study, found = made.study, {}
    prompts, scorer = _resolved_samples(made)
    for step, policy in policies_of(made).items():
        if outcomes.get(policy.name, Outcome("finished")).state == "failed":
            found[step] = Outcome("failed", f"needs {policy.name}, which failed")
            continue
        if not is_examined(made.folder, policy):
            if not is_loaded:  # once, for the forked processes that export
                load_engine([run.config for run in made.runs])
                is_loaded = True
            say(f"{policy.name}: samples and tasks (output in {made.folder / 'logs'})")
        found[step] = _outcome(examine, made.folder, policy, study.samples, prompts, scorer, study.tasks)
        if found[step].state == "failed":
            say(f"{step} failed: {found[step].reason}")
    return found


def _resolved_samples(made: Plan) -> tuple[str, str]:
    samples = made.study.samples
    if samples is None:
        return "", ""
    return made.resolved(samples.prompts, "samples.prompts"), made.resolved(samples.scorer, "samples.scorer")


def _outcome(function: Callable[..., object], *args: object, **named: object) -> Outcome:
    try:
        function(*args, **named)
    except (UserError, RankFailure) as error:
        return _failed(error)
    return Outcome("finished")


def _failed(error: UserError | RankFailure) -> Outcome:
    """Reduce the error to one line, the last one of a traceback; all of it is printed."""
    if isinstance(error, RankFailure):
        print(error, file=sys.stderr, flush=True)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[0] if isinstance(error, UserError) else lines[-1]
    return Outcome("failed", line if len(line) <= MAX_REASON else f"{line[: MAX_REASON - 1]}…")
