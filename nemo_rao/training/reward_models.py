"""``online.reward=[model:RUN_FOLDER]``: a trained reward model scores samples on the ranks of the run that draws them.

It reads the sampled tokens, never their text tokenised again, so that tokenizer and chat template have to be the
run's. Its network is its own; it is split over ranks as the policy is. All that does not fit is found before a model is
built.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from nemo_rao.batch import Row
from nemo_rao.checkpoint.layout import weights_of
from nemo_rao.config.architecture import architecture_fields
from nemo_rao.config.checks import UNEVEN_STAGES, check_engine, check_network
from nemo_rao.config.run_config import DataConfig, RunConfig
from nemo_rao.data.encode import load_tokenizer
from nemo_rao.data.rendering_record import ChatTemplate, Rendering
from nemo_rao.engines.engine import engine_of
from nemo_rao.errors import UserError
from nemo_rao.loop.prepared import TokenScorer
from nemo_rao.training.loading import LoadedData
from nemo_rao.training.model_checks import check_model
from nemo_rao.training.trained_run import trained_run

_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
)
_OF_EXPERTS = ("expert_model_parallel_size", "expert_tensor_parallel_size")
_COMPARED = 64  # prompts


@dataclass(frozen=True)
class RewardModelOfRun:
    """A reward model beside the policy of a run.

    Attributes:
        run: the folder that the user named.
        data: how its own training made tokens of text.
        config: its recipe, with parallel sizes and tokenizer of the policy's run.
        objective_config: of its objective, which decides its head.
        checkpoint: its weights.
    """

    run: str
    data: DataConfig
    config: RunConfig
    objective_config: Any
    checkpoint: Path

    def scorer(self, name: str) -> TokenScorer:
        """What the ranks make of it."""
        load = functools.partial(_loaded_chunks, self.config, self.objective_config, self.checkpoint)
        return TokenScorer(name, load)

    def check_tokens(self, policy: RunConfig, loaded: LoadedData) -> None:
        """Checks that it was trained on the tokens that the policy samples.

        Raises:
            UserError: on those of another tokenizer or chat template.
        """
        with self._named():
            _check_tokenizer(self.data, policy.data)
            _check_prompts(self.data, loaded)

    def check_model(self, num_tokens: int) -> None:
        """Checks network and checkpoint; imports the engine.

        Raises:
            UserError: they do not fit each other, the tokenizer or the ranks.
        """
        with self._named():
            check_model(self.config, num_tokens, self.checkpoint, None)

    def close(self) -> None:
        """Nothing is held, unlike by scorers of text."""

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"online.reward=model:{self.run}: {error}") from None


def reward_model_of(run: str, policy: RunConfig) -> RewardModelOfRun:
    """The reward model that a run has trained.

    Raises:
        UserError: the run has trained none, or it cannot be split as the policy is.
    """
    trained = trained_run(run)
    config, keys = trained.config, policy.model
    if not trained.needs.scores:
        raise UserError(
            f"{run}: objective {config.model.objective} trains no reward model (its implicit reward is for nemo-rao "
            "score); name a run of rm or rm_regression"
        )
    if config.precision.fp8 is not None:
        raise UserError(f"{run}: precision.fp8={config.precision.fp8}: 8-bit reward models do not score samples yet")
    if config.model.seq_length < keys.seq_length:
        raise UserError(
            f"{run}: was trained on at most model.seq_length={config.model.seq_length} tokens, and samples may have "
            f"{keys.seq_length} with their prompts; lower model.seq_length, or train it on longer rows"
        )
    with_experts = bool(architecture_fields(config).get("num_moe_experts"))
    split = {name: vars(keys)[name] for name in (*_PARALLEL, *(_OF_EXPERTS if with_experts else ()))}
    if not with_experts:
        split |= {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None}
    extra = {name: value for name, value in config.model.arch.extra.items() if not name.startswith(UNEVEN_STAGES)}
    beside = replace(
        config,
        trainer=policy.trainer,
        data=replace(config.data, tokenizer=policy.data.tokenizer),
        model=replace(config.model, arch=replace(config.model.arch, extra=extra), **split),
    )
    try:
        check_engine(beside)
        check_network(beside)
    except UserError as error:
        raise UserError(f"{run}: {error}") from None
    return RewardModelOfRun(run, config.data, beside, trained.objective_config, trained.checkpoint)


def _loaded_chunks(config: RunConfig, objective_config: Any, checkpoint: Path) -> Sequence[Any]:
    """This rank's, with their weights. A collective of all ranks."""
    from nemo_rao.mcore.checkpoint import load_weights
    from nemo_rao.mcore.seeds import random_numbers_kept

    with random_numbers_kept():
        chunks = engine_of(config).evaluation_chunks(config, objective_config)
    load_weights(weights_of(checkpoint), chunks)
    return chunks


def _check_tokenizer(own: DataConfig, policy: DataConfig) -> None:
    remedy = "train the reward model with this run's tokenizer and chat template"
    here = load_tokenizer(policy.tokenizer or "")
    there = here if own.tokenizer == policy.tokenizer else load_tokenizer(own.tokenizer or "")
    if (vocabulary := there.get_vocab()) != here.get_vocab():
        differ = sum(here.get_vocab().get(token) != number for token, number in vocabulary.items())
        raise UserError(
            f"its tokenizer {own.tokenizer} is not data.tokenizer={policy.tokenizer}: {differ} of its "
            f"{len(vocabulary)} tokens are absent there or have other ids; {remedy}"
        )
    for name in ("chat_template", "template_arguments"):
        if (given := getattr(own, name)) != (value := getattr(policy, name)):
            raise UserError(f"was trained with data.{name}={given}, and this run has {value}; {remedy}")
    if own.chat_template != "never" and there.chat_template != here.chat_template:
        raise UserError(f"the chat template of its tokenizer {own.tokenizer} is another one; {remedy}")
    if there.all_special_ids != here.all_special_ids:
        raise UserError(f"its tokenizer {own.tokenizer} has other special tokens than {policy.tokenizer}; {remedy}")


def _check_prompts(own: DataConfig, loaded: LoadedData) -> None:
    """The first prompts are the same tokens to both: rules by which text is cut are no part of a vocabulary."""
    rendering = Rendering(cast(ChatTemplate, own.chat_template), own.template_arguments)
    rows: Sequence[Row] = loaded.prompts[:_COMPARED]
    for number, sample in enumerate(rendering.encoder(load_tokenizer(own.tokenizer or "")).encode_many(rows)):
        if isinstance(sample, UserError) or sample.prompt.tolist() != loaded.train[number].prompt.tolist():
            raise UserError(
                f"its tokenizer {own.tokenizer} cuts the prompt of {rows[number].place} into other tokens than this "
                "run's does; train the reward model with this run's tokenizer"
            )
