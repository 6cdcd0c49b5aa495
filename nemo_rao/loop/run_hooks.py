"""Create the hooks of a run, and the data for them and the loss, from its recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nemo_rao.checkpoint.layout import weights_of
from nemo_rao.config.derived import reference_dir
from nemo_rao.config.monitor import validation_intervals
from nemo_rao.config.precision_checks import quantization
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.encode import load_tokenizer
from nemo_rao.data.store import PreferenceData
from nemo_rao.loop.critic import TrainCritic
from nemo_rao.loop.data import AlignmentData, TrainingData, batch_layout
from nemo_rao.loop.finite import StopWhereNotFinite
from nemo_rao.loop.first_step import CheckFirstStep
from nemo_rao.loop.hooks import CalibrateScales, MismatchedPass, RecordStart, SeedEveryStep, ShowProgress
from nemo_rao.loop.metrics import Metrics
from nemo_rao.loop.online_data import OnlineData
from nemo_rao.loop.prepared import OnlineTask, Prepared
from nemo_rao.loop.profile import ProfileSteps
from nemo_rao.loop.reference import ReferencePass
from nemo_rao.loop.rollout_parts import RolloutParts
from nemo_rao.loop.rollouts import MakeRollouts
from nemo_rao.loop.sampled_validation import ValidateSamples
from nemo_rao.loop.session import Hook
from nemo_rao.loop.stopping import StopWhenAsked
from nemo_rao.loop.throughput import throughput_of
from nemo_rao.loop.validation import Validation
from nemo_rao.objectives.base import Needs
from nemo_rao.rollout.samples import RolloutData
from nemo_rao.rollout.text import SampleText


def data_sets_of(config: RunConfig, prepared: Prepared) -> dict[str, AlignmentData]:
    """Create ``training`` data and, if there is any, ``validation`` data."""

    def laid_out(data: PreferenceData | RolloutData, mismatched: PreferenceData | None = None) -> AlignmentData:
        return AlignmentData(
            data,
            pad_token_id=prepared.pad_token_id,
            mismatched=None if mismatched is None else laid_out(mismatched),
            **batch_layout(config),
        )

    if prepared.online is not None:
        return {name: laid_out(data) for name, data in _rollout_data(config, prepared)}
    data_sets = {"training": laid_out(prepared.train, prepared.mismatched.get("train"))}
    if prepared.validation is not None:
        data_sets["validation"] = laid_out(prepared.validation, prepared.mismatched.get("validation"))
    return data_sets


def _rollout_data(config: RunConfig, prepared: Prepared) -> Iterator[tuple[str, RolloutData]]:
    keys, number = config.online, config.online.num_generations
    assert number is not None, "online runs set online.num_generations"
    slots = keys.mini_batches * config.model.global_batch_size
    yield "training", RolloutData(prepared.train, num_slots=slots, num_responses=number)
    if (prompts := prepared.validation) is not None:
        slots, number = len(prompts), keys.validation_generations
        yield "validation", RolloutData(prompts, num_slots=slots, num_responses=number)


def training_data(config: RunConfig, train: AlignmentData, online: OnlineTask | None = None) -> TrainingData:
    """Create the training data, with the order of its rows or prompts.

    Args:
        online: given for a run that samples its own responses.
    """
    common: dict[str, Any] = {
        "micro_batch_size": config.model.micro_batch_size,
        "global_batch_size": config.model.global_batch_size,
        "seed": config.data.seed if config.data.shuffle else None,
    }
    if online is None:
        return TrainingData(train, **common)
    keys = config.online
    return OnlineData(
        train, num_prompts=len(online.prompts), mini_batches=keys.mini_batches, epochs=keys.epochs, **common
    )


def hooks_of(
    config: RunConfig,
    needs: Needs,
    data_sets: Mapping[str, AlignmentData],
    prepared: Prepared,
    record: Callable[[], None],
) -> list[Hook]:
    """Create the hooks around the steps, in the order in which they are called.

    Args:
        needs: needs of the objective.
        data_sets: see :func:`data_sets_of`.
        prepared: result of the parent's preparation.
        record: called on rank 0 once all checks have passed.
    """
    keys, training = config.model, data_sets["training"].data
    hooks: list[Hook] = [StopWhenAsked(), SeedEveryStep(config.trainer.seed)]
    if config.precision.fp8 is not None and config.precision.fp8_recipe == "delayed":
        hooks.append(CalibrateScales())
    if prepared.online is not None:
        hooks += _sampling_hooks(config, needs, data_sets, prepared, prepared.online)
    elif needs.reference:
        mismatched = {f"{name}, mismatched": data.mismatched for name, data in data_sets.items() if data.mismatched}
        hooks.append(
            ReferencePass(
                {**data_sets, **mismatched},
                cache_dir=reference_dir(config),
                precision=quantization(config.precision),
                micro_batch_size=config.reference.micro_batch_size or keys.micro_batch_size,
                micro_batches_per_part=config.reference.save_every,
                show_progress=config.trainer.enable_progress_bar,
            )
        )
        hooks.append(CheckFirstStep(config.precision, reference_dir(config)))
    hooks += [
        Metrics(
            log_every_n_steps=config.trainer.log_every_n_steps,
            throughput=throughput_of(config, responses=round(training.num_responses / len(training))),
        ),
        StopWhereNotFinite(skips_steps=config.precision.params == "fp16"),
    ]
    if needs.kl_estimate:
        hooks.append(MismatchedPass())
    if "validation" in data_sets and prepared.online is None:
        hooks.append(
            Validation(
                data_sets["validation"],
                intervals=validation_intervals(config),
                micro_batch_size=keys.micro_batch_size,
            )
        )
    hooks.append(RecordStart(record))
    if config.trainer.enable_progress_bar:
        hooks.append(ShowProgress())
    if config.trainer.profile_steps is not None:
        first, last = config.trainer.profile_steps
        hooks.append(ProfileSteps(first, last))
    return hooks


def _sampling_hooks(
    config: RunConfig, needs: Needs, data_sets: Mapping[str, AlignmentData], prepared: Prepared, task: OnlineTask
) -> Iterator[Hook]:
    tokenizer = load_tokenizer(config.data.tokenizer or "")
    text = SampleText(tokenizer, task.prompts)
    critic = None if task.critic is None else TrainCritic(task.critic)
    parts = RolloutParts(
        config.online,
        task,
        end_tokens=text.end_tokens,
        adapters=config.model.peft.scheme != "none",
        needs=needs,
        start=None if prepared.start_from is None else weights_of(prepared.start_from),
    )
    yield MakeRollouts(config.online, parts, text, needs=needs, sampled_by_vllm=task.vllm is not None, critic=critic)
    if critic is not None:
        yield critic
    if "validation" in data_sets:
        yield ValidateSamples(
            data_sets["validation"],
            SampleText(tokenizer, task.validation_prompts),
            parts,
            needs,
            intervals=validation_intervals(config),
            micro_batch_size=config.model.micro_batch_size,
        )
