"""Losses of reward models: rm (Bradley-Terry, on pairs) and rm_regression (on numeric labels).

s(y) is the score of a linear head on the final hidden state of the response's end token. The metrics ``rewards/*`` are
computed from scores instead of implicit rewards.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_rao.batch import LossOutput, ObjectiveBatch, RewardSummary
from nemo_rao.errors import UserError
from nemo_rao.keys import key
from nemo_rao.objectives.base import Needs, Objective, ObjectiveConfig
from nemo_rao.objectives.metrics import implicit_reward_metrics
from nemo_rao.objectives.pairs import all_pairs, best_and_worst
from nemo_rao.objectives.reductions import metric, sum_of_prompt_means

# ---------------------------------------------------------------------------------------------------- Bradley-Terry


@dataclass(frozen=True)
class RewardModelConfig(ObjectiveConfig):
    block = "rm"

    margin: float = key(0.0, "target margin of scores per unit of difference of explicit rewards", low=0)
    center: float = key(0.01, "weight of (s_w + s_l)^2, which keeps scores around 0", low=0)


def bradley_terry_loss(batch: ObjectiveBatch, config: RewardModelConfig) -> LossOutput:
    """-ls(s_w - s_l - m) + c (s_w + s_l)^2, m = margin (r_w - r_l); mean over a prompt's pairs.

    In addition to ``rewards/*`` of scores, means over pairs that measure the calibration of p = sigmoid(s_w - s_l):

        rm/accuracy      1 where s_w > s_l
        rm/confidence    max(p, 1 - p); if it is above the accuracy, the model is overconfident
        rm/brier         (1 - p)^2, 0.25 for an uninformative model
    """
    assert batch.scores is not None, "a reward model's loss was given no scores"
    pairs, scores = all_pairs(batch), batch.scores[:, :, 0]
    chosen, rejected = pairs.of_chosen(scores), pairs.of_rejected(scores)
    logits = chosen - rejected
    margin: Tensor | float = 0.0
    if config.margin > 0:
        rewards = torch.where(batch.rewards.isnan(), 0, batch.rewards)
        margin = config.margin * (pairs.of_chosen(rewards) - pairs.of_rejected(rewards))
    losses = -logsigmoid(logits - margin) + config.center * (chosen + rejected).square()
    loss_sum, num_prompts = sum_of_prompt_means(losses, pairs.valid)

    probability = torch.sigmoid(logits.detach())
    of_pairs = {
        "rm/accuracy": (logits > 0).to(losses.dtype),
        "rm/confidence": torch.maximum(probability, 1 - probability),
        "rm/brier": (1 - probability).square(),
    }
    metrics = {name: metric(sum_of_prompt_means(values, pairs.valid)) for name, values in of_pairs.items()}
    metrics |= implicit_reward_metrics(scores, best_and_worst(batch))
    return LossOutput(loss_sum, num_prompts, metrics)


def bradley_terry_needs(config: RewardModelConfig) -> Needs:
    """Requirements; a margin also needs rewards."""
    return Needs(preference=True, pairs=True, min_responses=2, rewards=config.margin > 0, scores=1)


RM = Objective(
    name="rm",
    config_type=RewardModelConfig,
    loss=bradley_terry_loss,
    needs=bradley_terry_needs,
    formula="−lσ(s_w − s_l − m(r_w − r_l)) + c(s_w + s_l)², s the score of a reward model",
    source="Bradley and Terry 1952; margin: Touvron et al. 2023 (Llama 2); centering: Eisenstein et al. 2023",
    checked="TRL's RewardTrainer; formula, gradient by hand, finite differences",
)


# ------------------------------------------------------------------------------------------------------- regression


@dataclass(frozen=True)
class RegressionConfig(ObjectiveConfig):
    block = "rm_regression"

    mask_value: float = key(-100.0, "label of an unknown attribute, besides null")
    num_attributes: int | None = key(None, "number of scores of the head; null: one per data.reward_field", low=1)


def regression_loss(batch: ObjectiveBatch, config: RegressionConfig) -> LossOutput:
    """Mean over a response's known attributes of (s_a - r_a)^2, then over its prompt's responses.

    Responses without a known attribute are left out. ``rm/error``: the same mean of \\|s_a - r_a\\|. ``rewards/*`` are
    those of the first attribute.
    """
    assert batch.scores is not None, "a reward model's loss was given no scores"
    labels = batch.rewards[:, :, None] if batch.reward_ensemble is None else batch.reward_ensemble
    known = batch.valid[:, :, None] & ~labels.isnan() & (labels != config.mask_value)
    error = torch.where(known, batch.scores - torch.where(known, labels, 0), 0)
    counts = known.sum(-1)
    valid = counts > 0
    loss_sum, num_prompts = sum_of_prompt_means(error.square().sum(-1) / counts.clamp(min=1), valid)
    absolute = error.detach().abs().sum(-1) / counts.clamp(min=1)
    metrics = {
        "rm/error": metric(sum_of_prompt_means(absolute, valid)),
        **implicit_reward_metrics(batch.scores[:, :, 0], best_and_worst(batch)),
    }
    return LossOutput(loss_sum, num_prompts, metrics)


def count_attributes(config: RegressionConfig, rewards: RewardSummary) -> RegressionConfig:
    """Set the number of scores to the number of attributes in the data."""
    if config.num_attributes is None:
        return dataclasses.replace(config, num_attributes=rewards.num_columns)
    if config.num_attributes != rewards.num_columns:
        raise UserError(
            f"model.rm_regression.num_attributes={config.num_attributes}, but data.reward_field names "
            f"{rewards.num_columns}. Make them equal, or leave num_attributes out."
        )
    return config


RM_REGRESSION = Objective(
    name="rm_regression",
    config_type=RegressionConfig,
    loss=regression_loss,
    needs=lambda config: Needs(attributes=True, scores=config.num_attributes or 1),
    formula="mean over known attributes a of (s_a − r_a)²",
    source="Wang et al. 2024 (HelpSteer2)",
    checked="formula, gradient by hand, finite differences",
    resolve=count_attributes,
)
