"""A trained run as a scorer: ``nemo-rao score IN OUT --scorer model:runs/gpt_rm``.

A reward model gives the score of its head (the first, if there are several). A policy gives its implicit reward
beta * rho(y) = beta * (logp(y) - logp_ref(y)); the reference is the checkpoint from which its run started.

Sizes, tokenizer, parallelism and precision come from the run's recipe.yaml. The whole file is scored in one
forward-only pass over its ranks before the first row is written. Intermediate results are kept beside the output
(``model_scores/``), and an interrupted pass resumes from them. A response that is longer than the run's
model.seq_length (or ``--max-length``), or cannot be rendered as in training, gets no score; the prompt's others do. A
truncated response is scored without an end token; their number is reported, with how training treated them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rao.batch import ModelOutput, Row
from nemo_rao.checkpoint.layout import weights_of
from nemo_rao.checkpoint.pickles import refuse_code
from nemo_rao.config.architecture import network_key
from nemo_rao.config.derived import objective_config
from nemo_rao.config.precision_checks import quantization
from nemo_rao.config.run_config import RunConfig
from nemo_rao.engines.engine import engine_of
from nemo_rao.errors import RankFailure, UserError
from nemo_rao.runtime.console import quiet_third_parties, say
from nemo_rao.runtime.progress import Progress
from nemo_rao.scoring.missing import Missing, reasons_of
from nemo_rao.scoring.run import Job
from nemo_rao.scoring.scorer import InputRow, Kind, NoScore, OutputDirectory, Scored, ScoringFailure
from nemo_rao.training.ranks import pass_rank
from nemo_rao.training.score_rows import Tokenized, length_limit, tokenize, with_length
from nemo_rao.training.trained_run import trained_run

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from nemo_rao.batch import MicroBatch
    from nemo_rao.loop.session import Session

_FORMAT = "model-scores-2"


def model_kind(job: Job) -> Kind:
    """The scorer kind ``model:RUN_FOLDER`` for one job of the command."""
    return Kind(lambda run, output_dir: ModelScorer(run, job, output_dir), lambda run: Path(run).name, "RUN_FOLDER")


class ModelScorer:
    """Scores of a whole file, returned row by row; see :mod:`nemo_rao.scoring.scorer`.

    Args:
        run: directory of a finished training run.
        job: what to score, up to which length, and how many responses may be longer.
        output_dir: directory of the output.

    Raises:
        UserError: the run, its recipe or its checkpoint cannot be used, or ``job.max_length`` is beyond its context.
    """

    fields: tuple[str, ...] = ()
    forks = True

    def __init__(self, run: str, job: Job, output_dir: OutputDirectory) -> None:
        trained = _model(run)
        self._limit = length_limit(trained.config, run, job.max_length)
        self._model = replace(trained, config=with_length(trained.config, self._limit.tokens))
        self._run, self._job = run, job
        self._folder = output_dir.folder / "model_scores"
        self._scores: dict[str, Scored] | None = None
        self._remarks: Mapping[str, Sequence[str]] = {}
        self._counts: Counter[str] = Counter()
        self.identity: Mapping[str, Any] = {
            "model": run,
            "checkpoints": [_digest(c) for c in trained.checkpoints],
            "recipe": _what_scores_depend_on(trained.config),
            "max_length": self._limit.tokens,
        }

    def score(self, rows: Sequence[InputRow]) -> list[Scored]:
        if self._scores is None:
            self._scores = self._score_file()
        for row in rows:
            self._counts.update(f"rows: {remark}" for remark in self._remarks.get(row.location, ()))
        return [self._scores[row.location] for row in rows]

    def take_notes(self) -> Mapping[str, int]:
        counts, self._counts = self._counts, Counter()
        return counts

    def close(self) -> None:
        pass

    def _score_file(self) -> dict[str, Scored]:
        """Map the location of each row to the scores of its responses."""
        rows = list(self._job.source().rows())
        made = tokenize(rows, self._model.config, self._limit)
        self._check_missing(rows, made)
        for note in made.notes:
            say(note)
        self._remarks = {rows[at].location: remarks for at, remarks in made.remarks.items()}
        scores: dict[tuple[int, int], float | NoScore] = {**made.lacks}
        if len(made.data):
            try:
                columns = [_numbers(self._model, one, made, self._folder) for one in self._model.checkpoints]
            except RankFailure as failure:
                reason = str(failure).removesuffix(".")
                raise ScoringFailure(f"the model's pass failed: {reason}. The same command resumes it.") from None
            scores |= {
                number: float(value) for number, value in zip(made.numbers, self._model.score(columns), strict=True)
            }
        return {row.location: tuple(scores[at, k] for k in range(len(row.responses))) for at, row in enumerate(rows)}

    def _check_missing(self, rows: Sequence[Row], made: Tokenized) -> None:
        """Stop before the pass if it could not give enough scores.

        Raises:
            ScoringFailure: too many responses cannot be scored.
        """
        missing = Missing([self._run], sum(len(row.responses) for row in rows), self._job.max_missing)
        for at, row in enumerate(rows):
            scores = tuple(made.lacks.get((at, number), 0.0) for number in range(len(row.responses)))
            missing.add([reasons_of(row, {self._run: scores})])
        missing.check()


@dataclass(frozen=True)
class _Model:
    """What a run's model computes for each response, and how the score follows from it.

    Attributes:
        config: the run's recipe.
        objective_config: keys of its objective, with the number of scores of its head.
        checkpoints: checkpoints to run: the run's last one, and for an implicit reward also its start.
        width: numbers computed per response.
        score: maps arrays ``[responses, width]``, one per checkpoint, to ``[responses]``.
    """

    config: RunConfig
    objective_config: Any
    checkpoints: tuple[Path, ...]
    width: int
    score: Callable[[Sequence[np.ndarray]], np.ndarray]


def _model(run: str) -> _Model:
    from nemo_rao.checkpoint.adapters import refuse_adapters
    from nemo_rao.checkpoint.find import resolve_checkpoint

    trained = trained_run(run)
    config, keys, own, needs = trained.config, trained.objective_config, trained.checkpoint, trained.needs
    if needs.scores:
        return _Model(config, keys, (own,), needs.scores, lambda columns: columns[0][:, 0])
    beta = getattr(keys, "beta", None)
    if beta is None or not needs.reference:
        raise UserError(
            f"{run}: objective {config.model.objective} has no implicit reward (a beta and a reference). Name the run "
            "of a reward model, or of an objective such as rao or dpo."
        )
    if config.model.restore_from_path is None:
        raise UserError(
            f"{run}: started from random weights and has no reference. Name a run that started from a model."
        )
    start = resolve_checkpoint(config.model.restore_from_path, f"{run}/recipe.yaml: model.restore_from_path")
    refuse_adapters(start, f"{run}/recipe.yaml: model.restore_from_path")
    if not config.model.allow_pickle:
        refuse_code(start, f"{run}/recipe.yaml: model.restore_from_path")
    return _Model(config, keys, (own, start), 2, lambda columns: beta * (columns[0][:, 1] - columns[1][:, 1]))


def _digest(checkpoint: Path) -> str:
    """Digest of a checkpoint's path and files; other weights are other files."""
    files = sorted(weights_of(checkpoint).glob("*"))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(checkpoint), stamps)).encode()).hexdigest()


def _what_scores_depend_on(config: RunConfig) -> dict[str, Any]:
    """The keys of a run's recipe on which scores depend: network, precision, objective, tokenization."""
    data = config.data
    return {
        "network": [network_key(config), dataclasses.asdict(config.model.arch), config.model.seq_length],
        "precision": quantization(config.precision),
        "objective": [config.model.objective, dataclasses.asdict(objective_config(config))],
        "tokens": [data.tokenizer, data.chat_template, data.template_arguments, data.answers],
    }


def _numbers(model: _Model, checkpoint: Path, made: Tokenized, folder: Path) -> np.ndarray:
    """``[responses, width]`` of one checkpoint: read from disk, or computed on the run's ranks."""
    from nemo_rao.runtime.launch import launch, started_externally
    from nemo_rao.training.devices import select_device

    if started_externally() or model.config.trainer.num_nodes > 1:
        raise UserError("nemo-rao score: starts its ranks itself, on one node. Do not start it with srun or torchrun.")
    quiet_third_parties()
    select_device(model.config)
    engine = engine_of(model.config)
    engine.load()
    from nemo_rao.mcore.network import network_fingerprint
    from nemo_rao.mcore.reference import load_numbers

    network = network_fingerprint(engine.model_config(model.config))
    parts = (_FORMAT, _digest(checkpoint), network, made.data.fingerprint(), quantization(model.config.precision))
    key = hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]
    if (found := load_numbers(folder, key, made.data.num_responses, model.width)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        compute = functools.partial(_compute, config=model.config, folder=folder, key=key, width=model.width)
        arguments = (model.config, model.objective_config, made.data, made.pad_token_id, checkpoint, folder, compute)
        launch(pass_rank, arguments, num_ranks=model.config.trainer.devices, in_children=True)
        found = load_numbers(folder, key, made.data.num_responses, model.width)
    assert found is not None
    return found


def _compute(session: Session, *, config: RunConfig, folder: Path, key: str, width: int) -> None:
    """Run one rank's part of the pass and write ``[responses, width]`` to ``folder``."""
    import torch

    from nemo_rao.mcore.loss import sequence_log_probs
    from nemo_rao.mcore.reference import compute_numbers

    def numbers(output: ModelOutput, batch: MicroBatch) -> Tensor:
        if output.scores is not None:
            return output.scores
        return torch.stack(sequence_log_probs(output, batch, vocab_size=session.loss.vocab_size), dim=-1)

    scored = session.data.train
    shown = config.trainer.enable_progress_bar and session.is_first_rank
    with Progress("scores", unit="prompt", shown=shown) as progress:
        compute_numbers(
            session.chunks,
            numbers=numbers,
            width=width,
            prompts=scored.responses_of_prompts(),
            make_micro_batch=scored.micro_batch,
            micro_batch_size=config.reference.micro_batch_size or config.model.micro_batch_size,
            micro_batches_per_part=config.reference.save_every,
            cache_dir=folder,
            key=key,
            progress=progress.update,
        )
