"""A trained run as a scorer: ``nemo-rao score IN OUT --scorer model:runs/gpt_rm``.

A reward model gives the score of its head, of several the first. A policy gives its implicit reward
beta * rho(y) = beta * (logp(y) - logp_ref(y)); the reference is the checkpoint that its run started from.

The run's recipe.yaml says all that is needed: sizes, tokenizer, parallelism, precision. The whole file is scored in
one forward-only pass over its ranks before the first row is written. What the pass has computed lies beside the output
(``model_scores/``) and is continued after an interruption. A response that is too long for the model, or has no
boundary in tokens, gets no score; the prompt's others do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rao.batch import ModelOutput, Row, Sample
from nemo_rao.data.rows import read_rows
from nemo_rao.errors import RankFailure, UserError
from nemo_rao.integration.config import RunConfig
from nemo_rao.integration.derived import objective_config
from nemo_rao.integration.pickles import refuse_code
from nemo_rao.integration.precision_checks import quantisation
from nemo_rao.integration.typed_config import load_recipe
from nemo_rao.objectives import registry
from nemo_rao.progress import Progress
from nemo_rao.scoring.scorer import InputRow, Kind, Place, Scores, ScoringFailure

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from nemo_rao.batch import MicroBatch
    from nemo_rao.data.store import PreferenceData

_FORMAT = "model-scores-2"


def model_kind(path: str) -> Kind:
    """The kind ``model:RUN_FOLDER`` for scoring the file ``path``."""
    return Kind(lambda run, place: ModelScorer(run, path, place), lambda run: Path(run).name, "RUN_FOLDER")


class ModelScorer:
    """Scores of a whole file, given out row by row; see :mod:`nemo_rao.scoring.scorer`.

    Args:
        run: folder of a finished training run.
        path: the file to be scored.
        place: where the output goes.

    Raises:
        UserError: the run, its recipe or its checkpoint cannot be used.
    """

    fields: tuple[str, ...] = ()
    forks = True

    def __init__(self, run: str, path: str, place: Place) -> None:
        self._job = _job(run)
        self._path = path
        self._folder = place.folder / "model_scores"
        self._scores: dict[str, Scores] | None = None
        self._unscored = 0
        self.identity: Mapping[str, Any] = {
            "model": run,
            "checkpoints": [_digest(c) for c in self._job.checkpoints],
            "recipe": _what_scores_depend_on(self._job.config),
        }

    def score(self, rows: Sequence[InputRow]) -> list[Scores]:
        if self._scores is None:
            self._scores = self._score_file()
        scores = [self._scores[row.place] for row in rows]
        self._unscored += sum(score is None for row in scores for score in row)
        return scores

    def notes(self) -> Mapping[str, int]:
        return {"responses without a score: too long, or without a boundary in tokens": self._unscored}

    def close(self) -> None:
        pass

    def _score_file(self) -> dict[str, Scores]:
        """Place of a row -> its responses' scores."""
        rows = list(read_rows(self._path))
        data, kept = _tokenised(rows, self._job.config)
        scores: dict[str, list[float | None]] = {row.place: [None] * len(row.responses) for row in rows}
        if len(data):
            try:
                columns = [_numbers(self._job, checkpoint, data, self._folder) for checkpoint in self._job.checkpoints]
            except RankFailure as failure:
                raise ScoringFailure(f"the model's pass failed; the same command continues it: {failure}") from None
            for (row_number, response_number), value in zip(kept, self._job.score(columns), strict=True):
                scores[rows[row_number].place][response_number] = float(value)
        return {place: tuple(of_row) for place, of_row in scores.items()}


@dataclass(frozen=True)
class _Job:
    """What a run computes of each response, and how that becomes its score.

    Attributes:
        config: the run's recipe.
        objective_config: of its objective, with the number of scores that its head has.
        checkpoints: whose weights are run: the run's own, and for an implicit reward its start's.
        width: numbers of each response.
        score: arrays ``[responses, width]``, one for each checkpoint -> ``[responses]``.
    """

    config: RunConfig
    objective_config: Any
    checkpoints: tuple[Path, ...]
    width: int
    score: Callable[[Sequence[np.ndarray]], np.ndarray]


def _job(run: str) -> _Job:
    folder = Path(run).expanduser()
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{run}: no recipe.yaml in it; give the folder of a training run")
    config = load_recipe(folder / "recipe.yaml")
    if config.model.peft.scheme != "none":
        raise UserError(f"{run}: trained adapters ({config.model.peft.scheme}), which cannot be scored with yet")
    from nemo_rao.integration.adapter_checkpoints import refuse_adapters
    from nemo_rao.integration.checkpoints import last_checkpoint, resolve_checkpoint

    own = last_checkpoint(folder)
    if own is None:
        raise UserError(f"{run}: no finished checkpoint in checkpoints/; train it first")
    if not config.model.allow_pickle:
        refuse_code(own, run)
    keys = objective_config(config)
    needs = registry.get(config.model.objective).needs_of(keys)
    if needs.scores:
        if hasattr(keys, "num_attributes"):
            keys = dataclasses.replace(keys, num_attributes=_num_scores(own))
        width = registry.get(config.model.objective).needs_of(keys).scores
        return _Job(config, keys, (own,), width, lambda columns: columns[0][:, 0])
    beta = getattr(keys, "beta", None)
    if beta is None or not needs.reference:
        raise UserError(
            f"{run}: objective {config.model.objective} has no implicit reward (a beta and a reference); give the run "
            "of a reward model, or of an objective such as rao or dpo"
        )
    if config.model.restore_from_path is None:
        raise UserError(f"{run}: started from random weights, no reference; give a run that started from a model")
    start = resolve_checkpoint(config.model.restore_from_path, f"{run}/recipe.yaml: model.restore_from_path")
    refuse_adapters(start, f"{run}/recipe.yaml: model.restore_from_path")
    if not config.model.allow_pickle:
        refuse_code(start, f"{run}/recipe.yaml: model.restore_from_path")
    return _Job(config, keys, (own, start), 2, lambda columns: beta * (columns[0][:, 1] - columns[1][:, 1]))


def _num_scores(checkpoint: Path) -> int:
    from nemo_rao.integration.prepare import import_nemo

    import_nemo()
    from megatron.core.dist_checkpointing import load_tensors_metadata

    from nemo_rao.mcore.heads import SCORE_HEAD

    for name, tensor in load_tensors_metadata(str(checkpoint / "weights")).items():
        if name.endswith(f"{SCORE_HEAD}.weight"):
            return int(tensor.global_shape[0])
    raise UserError(f"{checkpoint}: has no score head; name the run of a reward model")


def _digest(checkpoint: Path) -> str:
    """Of a checkpoint's place and files; other weights are other files."""
    files = sorted((checkpoint / "weights").glob("*"))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(checkpoint), stamps)).encode()).hexdigest()


def _what_scores_depend_on(config: RunConfig) -> dict[str, Any]:
    """Of a run's recipe: network, number formats, objective, and how text becomes tokens."""
    data = config.data
    return {
        "network": [config.model.config_class, dataclasses.asdict(config.model.arch), config.model.seq_length],
        "precision": quantisation(config.precision),
        "objective": [config.model.objective, dataclasses.asdict(objective_config(config))],
        "tokens": [data.tokenizer, data.chat_template, data.template_arguments],
    }


def _tokenised(rows: Sequence[Row], config: RunConfig) -> tuple[PreferenceData, list[tuple[int, int]]]:
    """The responses that the model can read, and for each, in the data's order, (row, response) numbers in ``rows``."""
    from nemo_rao.data.dataset import ROWS_AT_ONCE
    from nemo_rao.data.encode import BoundaryError, Encoder, load_tokenizer
    from nemo_rao.data.store import PreferenceData

    keys = config.data
    encoder = Encoder(
        load_tokenizer(keys.tokenizer or ""),
        chat_template=keys.chat_template,  # type: ignore[arg-type]
        template_arguments=keys.template_arguments,
    )
    kept: list[tuple[int, int]] = []

    def samples() -> Iterator[Sample]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            for row_number, (row, whole) in enumerate(zip(batch, encoder.encode_many(batch), strict=True), start):
                numbers = list(range(len(row.responses)))
                if isinstance(whole, UserError) and not isinstance(whole, BoundaryError):
                    raise whole
                if isinstance(whole, BoundaryError):  # of at least one response
                    single = encoder.encode_many([replace(row, responses=(response,)) for response in row.responses])
                    readable = [(at, sample) for at, sample in enumerate(single) if isinstance(sample, Sample)]
                    if not readable:
                        continue
                    numbers = [at for at, _ in readable]
                    whole = replace(readable[0][1], responses=tuple(sample.responses[0] for _, sample in readable))
                room = config.model.seq_length - len(whole.prompt)
                fits = [at for at, response in enumerate(whole.responses) if len(response) <= room]
                if fits:
                    kept.extend((row_number, numbers[at]) for at in fits)
                    yield _unrewarded(whole, fits)

    return PreferenceData(samples()), kept


def _unrewarded(sample: Sample, responses: Sequence[int]) -> Sample:
    """The prompt with some of its responses, and nothing of what the file says of them."""
    import numpy as np

    return Sample(
        prompt=sample.prompt,
        responses=tuple(sample.responses[at] for at in responses),
        rewards=np.full(len(responses), np.nan),
        ranked=False,
        place=sample.place,
        ensemble=np.zeros((len(responses), 0)),
        reference_rewards=np.zeros(0),
        answers=None if sample.answers is None else tuple(sample.answers[at] for at in responses),
    )


def _numbers(job: _Job, checkpoint: Path, data: PreferenceData, folder: Path) -> np.ndarray:
    """``[responses, width]`` of one checkpoint: read back, or computed on the run's ranks."""
    from nemo_rao.integration.launch import launch, started_externally
    from nemo_rao.integration.prepare import import_nemo, select_device
    from nemo_rao.integration.talk import quiet_third_parties

    if started_externally() or job.config.trainer.num_nodes > 1:
        raise UserError("nemo-rao score starts its ranks itself, on one node; do not start it with srun or torchrun")
    quiet_third_parties()
    select_device(job.config)
    import_nemo()
    from nemo_rao.integration import build
    from nemo_rao.mcore.network import network_fingerprint
    from nemo_rao.mcore.reference import load_numbers

    network = network_fingerprint(build.model_config(job.config))
    parts = (_FORMAT, _digest(checkpoint), network, data.fingerprint(), quantisation(job.config.precision))
    key = hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]
    if (found := load_numbers(folder, key, data.num_responses, job.width)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        arguments = (job.config, job.objective_config, data, checkpoint, folder, key, job.width)
        launch(_run_rank, arguments, num_ranks=job.config.trainer.devices, in_children=True)
        found = load_numbers(folder, key, data.num_responses, job.width)
    assert found is not None
    return found


def _run_rank(
    config: RunConfig, keys: Any, data: PreferenceData, checkpoint: Path, folder: Path, key: str, width: int
) -> None:
    """One rank's part of the pass; its place is in the environment."""
    import lightning.pytorch as pl
    import torch

    from nemo_rao.data.encode import pad_token_id
    from nemo_rao.integration import build
    from nemo_rao.integration.callbacks import model_chunks
    from nemo_rao.integration.data_module import AlignmentData, AlignmentDataModule
    from nemo_rao.integration.train import make_trainer, set_up_rank
    from nemo_rao.mcore.loss import sequence_log_probs
    from nemo_rao.mcore.reference import compute_numbers

    class Done(Exception):
        """The pass is over: nothing is to be trained."""

    class Pass(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            def numbers(output: ModelOutput, batch: MicroBatch) -> Tensor:
                if output.scores is not None:
                    return output.scores
                return torch.stack(sequence_log_probs(output, batch, vocab_size=pl_module.vocab_size), dim=-1)

            shown = config.trainer.enable_progress_bar and trainer.is_global_zero
            with Progress("scores", unit="prompt", shown=shown) as progress:
                compute_numbers(
                    model_chunks(trainer),
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
            raise Done

    set_up_rank(config)
    model = build.model(config, keys, max_steps=1)
    padding = pad_token_id(model.tokenizer.tokenizer)
    scored = AlignmentData(data, pad_token_id=padding, **build.batch_layout(config))
    module = AlignmentDataModule(
        scored,
        micro_batch_size=config.model.micro_batch_size,
        global_batch_size=config.model.global_batch_size,
        seq_length=config.model.seq_length,
        seed=None,
    )
    trainer = make_trainer(config, max_steps=1, folder=folder, start_from=checkpoint)
    trainer.callbacks[:0] = [Pass()]
    with contextlib.suppress(Done):
        trainer.fit(model, module)
