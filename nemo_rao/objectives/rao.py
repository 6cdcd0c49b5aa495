"""RAO, Reward Alignment Optimization (ACL 2026, long.2027, Algorithm 1).

    log Z(x)  = log_z0 + sg(rho_x)
    r_hat(y)  = beta * (rho(y) + log Z(x))
    L         = (r(x, y) - r_hat(y))^2,    dL / dlogp(y) = -2 beta (r - r_hat) / K

rho(y) = logp(y) - logp_ref(y) of the response, rho_x the same for the prompt without its first token t0, sg = stop
gradient. Mean over a prompt's responses, then over prompts. The loss of a response is zero at
rho(y) = r / beta - log_z0 - rho_x.

**Choice** The paper's Z_0 is interpreted as log Z_0, in nats: it is searched in [-50, 500], and Z, a sum of positive
terms, can only be negative as a logarithm.
**Choice** rho_x is taken from each response's own row. The rows of one prompt have the same value up to rounding.
**Beyond the paper** ``log_z0: auto``, the default, sets log_z0 = mean(r) / beta, so that the mean of the target rho is
initially 0. The paper's 50 fits the scale of its reward model: with rewards from 0 to 1, every response would have to
lose 40 nats or more. With ``prefix_gradient: true``, the gradient flows through rho_x (the variant of Eq. 8).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from nemo_rao.batch import LossOutput, ObjectiveBatch, RewardSummary
from nemo_rao.errors import UserError
from nemo_rao.keys import key
from nemo_rao.objectives.base import MeanTarget, Needs, Objective, ObjectiveConfig
from nemo_rao.objectives.metrics import shared_metrics
from nemo_rao.objectives.pairs import best_and_worst
from nemo_rao.objectives.reductions import (
    log_ratio,
    metric,
    response_log_ratio,
    rewarded,
    sum_of_prompt_means,
    sum_over_prompts,
)

AUTO = "auto"


@dataclass(frozen=True)
class RAOConfig(ObjectiveConfig):
    block = "rao"

    beta: float = key(0.1, "reward per nat of log-ratio to the reference", low=0, exclusive=True)
    log_z0: float | str = key(
        AUTO, "nats, constant part of log Z(x); auto: mean reward of the training data / beta; 50 in the RAO paper"
    )
    prefix_gradient: bool = key(False, "also train the prompt's log-probability through log Z(x) (Eq. 8)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.log_z0, str) and self.log_z0 != AUTO:
            raise UserError(f"model.rao.log_z0={self.log_z0!r}: must be a number, in nats, or {AUTO}")


def rao_loss(batch: ObjectiveBatch, config: RAOConfig) -> LossOutput:
    """Loss and metrics of P prompts with up to K responses.

    Responses without an explicit reward are left out of the loss. ``rewards/*`` are beta * rho(y), without log Z(x),
    for comparison with other objectives. In addition to the shared metrics, means over prompts of the means over
    responses:

        rao/target_error      |r - r_hat|; the loss is the same mean of its square
        rao/log_z             log Z(x), nats
        rao/prompt_logratio   rho_x, nats: 0 at the start, then the drift of the prompt's log-probability

    and ``rao/r_hat_chosen``, ``rao/r_hat_rejected``: r_hat of each pair, to be compared with ``data/reward_*``.
    """
    assert not isinstance(config.log_z0, str), "log_z0=auto must be resolved before training"
    prompt_log_ratio = log_ratio(batch.prompt_logps, batch.reference_prompt_logps, batch.valid)
    rho = response_log_ratio(batch)
    # Z is detached: with a gradient, the policy could reach its targets by changing the probability of prompts.
    log_z = config.log_z0 + (prompt_log_ratio if config.prefix_gradient else prompt_log_ratio.detach())
    r_hat = config.beta * (rho + log_z)

    valid = rewarded(batch)
    error = torch.where(valid, batch.rewards, 0) - r_hat
    loss_sum, num_prompts = sum_of_prompt_means(error.square(), valid)

    pairs = best_and_worst(batch)
    metrics = {
        "rao/target_error": metric(sum_of_prompt_means(error.abs(), valid)),
        "rao/log_z": metric(sum_of_prompt_means(log_z, valid)),
        "rao/prompt_logratio": metric(sum_of_prompt_means(prompt_log_ratio, valid)),
        "rao/r_hat_chosen": metric(sum_over_prompts(pairs.of_chosen(r_hat), pairs.valid)),
        "rao/r_hat_rejected": metric(sum_over_prompts(pairs.of_rejected(r_hat), pairs.valid)),
    }
    return LossOutput(loss_sum, num_prompts, metrics | shared_metrics(batch, config.beta * rho))


def resolve_log_z0(config: RAOConfig, rewards: RewardSummary) -> RAOConfig:
    """``log_z0: auto`` -> mean(r) / beta."""
    if config.log_z0 != AUTO:
        return config
    if rewards.mean is None:
        raise UserError("model.rao.log_z0=auto: every training response must have a reward. Set it to a number (nats).")
    return dataclasses.replace(config, log_z0=rewards.mean / config.beta)


def mean_target_of_rao(config: RAOConfig, rewards: RewardSummary) -> MeanTarget | None:
    """mean(r) / beta - log_z0, since rho_x is 0 at the start."""
    if rewards.mean is None:
        return None
    assert not isinstance(config.log_z0, str), "log_z0=auto must be resolved first"
    centered = rewards.mean / config.beta
    return MeanTarget(centered - config.log_z0, f"model.rao.log_z0={centered:.4g} ({AUTO})")


def needs_of_rao(config: RAOConfig) -> Needs:
    """Requirements; ``prefix_gradient`` needs the gradient of the prompts' log-probabilities."""
    return Needs(
        reference=True,
        rewards=True,
        shared_first_token=True,
        prompt_logps=True,
        prompt_gradient=config.prefix_gradient,
    )


RAO = Objective(
    name="rao",
    config_type=RAOConfig,
    loss=rao_loss,
    needs=needs_of_rao,
    formula="(r − β(ρ + log Z))², log Z = log_z0 + sg(ρ_x)",
    source="RAO, ACL 2026 long.2027, Algorithm 1",
    checked="formula, gradient by hand, finite differences; its invariances through the whole model",
    resolve=resolve_log_z0,
    mean_target=mean_target_of_rao,
)
