"""A second model on the policy's ranks, loaded from the run that trained it: a reward model, or a critic's start.

It reads the sampled token ids directly, so tokenizer and chat template must be the policy's. Its network may differ,
but is split over ranks as the policy is. All mismatches are reported before a model is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from nemo_rao.objectives.base import Needs
from nemo_rao.training.loading import LoadedData
from nemo_rao.training.trained_run import TrainedRun

_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
)
_OF_EXPERTS = ("expert_model_parallel_size", "expert_tensor_parallel_size")
_COMPARED = 64  # prompts


def beside(trained: TrainedRun, run: str, policy: RunConfig, **keys: Any) -> RunConfig:
    """Return the recipe of a run's model, split as the policy is.

    Args:
        trained: the run.
        run: its directory as the user wrote it, for messages.
        policy: the policy's recipe.
        keys: further groups of keys to replace.

    Raises:
        UserError: it cannot be split that way, was trained in 8-bit formats, or on shorter rows than the policy's.
    """
    config, of_policy = trained.config, policy.model
    if config.precision.fp8 is not None:
        raise UserError(f"{run}: precision.fp8={config.precision.fp8}: 8-bit models cannot score samples yet.")
    if config.model.seq_length < of_policy.seq_length:
        raise UserError(
            f"{run}: was trained with model.seq_length={config.model.seq_length}, but samples with their prompts may "
            f"have {of_policy.seq_length} tokens. Lower model.seq_length, or train it on longer rows."
        )
    with_experts = bool(architecture_fields(config).get("num_moe_experts"))
    split = {name: vars(of_policy)[name] for name in (*_PARALLEL, *(_OF_EXPERTS if with_experts else ()))}
    if not with_experts:
        split |= {"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None}
    extra = {name: value for name, value in config.model.arch.extra.items() if not name.startswith(UNEVEN_STAGES)}
    made = replace(
        config,
        trainer=policy.trainer,
        data=replace(config.data, tokenizer=policy.data.tokenizer),
        model=replace(config.model, arch=replace(config.model.arch, extra=extra), **split),
        **keys,
    )
    try:
        check_engine(made)
        check_network(made)
    except UserError as error:
        raise UserError(f"{run}: {error}") from None
    return made


def chunks_of(config: RunConfig, needs: Needs, checkpoint: Path | None, *, is_trained: bool = False) -> Sequence[Any]:
    """Build this rank's chunks of a second model. A collective of all ranks.

    Args:
        config: see :func:`beside`.
        needs: needs of the objective that uses it, which decide its head.
        checkpoint: checkpoint of the weights; ``None``: the caller loads them.
        is_trained: whether this run trains it.
    """
    from nemo_rao.mcore.checkpoint import load_weights
    from nemo_rao.mcore.seeds import random_numbers_kept

    with random_numbers_kept():
        chunks = engine_of(config).second_model(config, needs, is_trained=is_trained)
    if checkpoint is not None:
        load_weights(weights_of(checkpoint), chunks)
    return chunks


def check_tokens(own: DataConfig, policy: RunConfig, loaded: LoadedData, *, what: str) -> None:
    """Check that a model was trained with the policy's tokenizer and chat template.

    Args:
        own: ``data`` of the model's recipe.
        policy: the policy's recipe.
        loaded: the run's prompts.
        what: what to call the model in messages.

    Raises:
        UserError: it was trained with different ones.
    """
    _check_tokenizer(own, policy.data, f"train the {what} with this run's tokenizer and chat template")
    _check_prompts(own, loaded, f"train the {what} with this run's tokenizer")


def _check_tokenizer(own: DataConfig, policy: DataConfig, remedy: str) -> None:
    here = load_tokenizer(policy.tokenizer or "")
    there = here if own.tokenizer == policy.tokenizer else load_tokenizer(own.tokenizer or "")
    if (vocabulary := there.get_vocab()) != here.get_vocab():
        differ = sum(here.get_vocab().get(token) != number for token, number in vocabulary.items())
        raise UserError(
            f"its tokenizer {own.tokenizer} differs from data.tokenizer={policy.tokenizer}: {differ} of its "
            f"{len(vocabulary)} tokens are missing there or have other ids; {remedy}"
        )
    for name in ("chat_template", "template_arguments"):
        if (given := vars(own)[name]) != (value := vars(policy)[name]):
            raise UserError(f"was trained with data.{name}={given}, but this run has {value}; {remedy}")
    if own.chat_template != "never" and there.chat_template != here.chat_template:
        raise UserError(f"its tokenizer {own.tokenizer} has a different chat template; {remedy}")
    if there.all_special_ids != here.all_special_ids:
        raise UserError(f"its tokenizer {own.tokenizer} has different special tokens than {policy.tokenizer}; {remedy}")


def _check_prompts(own: DataConfig, loaded: LoadedData, remedy: str) -> None:
    """Compare the tokens of the first prompts: equal vocabularies do not imply equal tokenization."""
    rendering = Rendering(cast(ChatTemplate, own.chat_template), own.template_arguments)
    rows: Sequence[Row] = loaded.prompts[:_COMPARED]
    for number, sample in enumerate(rendering.encoder(load_tokenizer(own.tokenizer or "")).encode_many(rows)):
        if isinstance(sample, UserError) or sample.prompt.tolist() != loaded.train[number].prompt.tolist():
            raise UserError(
                f"its tokenizer {own.tokenizer} splits the prompt of {rows[number].location} into other tokens than "
                f"this run's; {remedy}"
            )
