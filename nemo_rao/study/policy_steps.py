"""The steps for one policy, each called in a child process: export, sampling, scoring, tasks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_rao.errors import RankFailure
from nemo_rao.scoring.run import KINDS, Job
from nemo_rao.scoring.scorer import ScoringFailure
from nemo_rao.study.schema import Samples, Tasks

IMPLICIT_REWARD = "implicit_reward"  # column of scored samples


def export(checkpoint: Path, model: Path) -> None:
    """Run ``nemo-rao export-hf``."""
    from nemo_rao.hugging_face.exporter import main

    options = {"dtype": None, "adapters": False, "base": None, "allow_pickle": False}
    main(argparse.Namespace(checkpoint=str(checkpoint), dest=str(model), **options))


def generate_samples(model: Path, prompts: str, output: Path, samples: Samples) -> None:
    """Run ``nemo-rao generate``."""
    from nemo_rao.generation.generate import generate
    from nemo_rao.generation.settings import GenerateSettings

    names = ("num_responses", "temperature", "max_new_tokens", "batch_size", "seed", "engine", "resamples")
    generate(str(model), prompts, str(output), GenerateSettings(**{name: vars(samples)[name] for name in names}))


def score_rows(job: Job) -> None:
    """Run ``nemo-rao score``, with trained models among the scorers.

    Raises:
        UserError, RankFailure: see :func:`nemo_rao.scoring.run.score`.
    """
    from nemo_rao.scoring.run import score
    from nemo_rao.training.score_model import model_kind

    job.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        score(job, {**KINDS, "model": model_kind(job)})
    except ScoringFailure as failure:
        raise RankFailure(str(failure)) from None


def score_samples(raw: Path, output: Path, scorer: str, model_of_ratio: Path | None) -> None:
    """Score samples; the implicit reward of ``model_of_ratio`` becomes a column of weight 0."""
    if model_of_ratio is None:
        score_rows(Job(str(raw), output, [scorer]))
    else:
        specs = [scorer, f"{IMPLICIT_REWARD}=model:{model_of_ratio}"]
        score_rows(Job(str(raw), output, specs, weight=[f"{IMPLICIT_REWARD}=0"]))


def evaluate_tasks(model: Path, out: Path, tasks: Tasks) -> None:
    """Run ``nemo-rao evaluate``."""
    from nemo_rao.generation.evaluate import Asked, evaluate
    from nemo_rao.generation.settings import EvaluateSettings

    names = ("limit", "num_fewshot", "batch_size", "apply_chat_template")
    settings = EvaluateSettings(**{name: vars(tasks)[name] for name in names})
    evaluate(str(model), str(out), Asked(tasks.names, include_path=tasks.include_path), settings)


def logged(log: Path, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(*args)`` and append all output of this process and its children to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = log.open("a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    function(*args)
