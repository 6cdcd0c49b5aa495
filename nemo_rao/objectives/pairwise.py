"""Pairwise losses on log-ratios to the reference policy: ipo, cal_dpo, hinge, dpop, dpo_shift, r_dpo, sppo.

    Delta = rho(w) - rho(l),    rho(y) = logp(y) - logp_ref(y),    w, l: the chosen and the rejected response

Each function computes the loss of one pair; :mod:`nemo_rao.objectives.pair_loss` reduces it. ls = log of the logistic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from nemo_rao.batch import RewardSummary
from nemo_rao.errors import UserError
from nemo_rao.keys import key
from nemo_rao.objectives.base import MeanTarget, Needs, Objective
from nemo_rao.objectives.pair_loss import WITH_REFERENCE, PairConfig, Terms, beta_rho, loss_of_pairs


@dataclass(frozen=True)
class IPOConfig(PairConfig):
    block = "ipo"

    beta: float = key(0.1, "the target margin is 1 / (2 beta) nats", low=0, exclusive=True)
    length_normalized: bool = key(False, "compare log-ratios per token, as in TRL and the published results")


def ipo_loss(chosen: Terms, rejected: Terms, config: IPOConfig) -> Tensor:
    """(Delta - 1/(2 beta))^2; with ``length_normalized`` each rho is divided by |y|."""
    per_token = config.length_normalized
    margin = chosen.mean_rho - rejected.mean_rho if per_token else chosen.rho - rejected.rho
    return (margin - 1 / (2 * config.beta)).square()


IPO = Objective(
    name="ipo",
    config_type=IPOConfig,
    loss=loss_of_pairs(ipo_loss, beta_rho),
    needs=WITH_REFERENCE,
    formula="(Δ − 1/(2β))²; `length_normalized`: each ρ divided by |y|",
    source="Azar et al. 2023, Eq. 17",
    checked="TRL `ipo` (length-normalized); formula, gradient by hand, finite differences",
)


@dataclass(frozen=True)
class CalDPOConfig(PairConfig):
    block = "cal_dpo"

    beta: float = key(0.001, "log-ratios are calibrated to +-1 / (2 beta) nats", low=0, exclusive=True)
    calibration_weight: float = key(1.0, "weight of the calibration; 1 in the paper, 0.5 in its code", low=0)


def cal_dpo_loss(chosen: Terms, rejected: Terms, config: CalDPOConfig) -> Tensor:
    """-ls(Delta) + w [(rho_w - 1/(2 beta))^2 + (rho_l + 1/(2 beta))^2]; the first term has no beta."""
    target = 1 / (2 * config.beta)
    calibration = (chosen.rho - target).square() + (rejected.rho + target).square()
    return -logsigmoid(chosen.rho - rejected.rho) + config.calibration_weight * calibration


CAL_DPO = Objective(
    name="cal_dpo",
    config_type=CalDPOConfig,
    loss=loss_of_pairs(cal_dpo_loss, beta_rho),
    needs=WITH_REFERENCE,
    formula="−lσ(Δ) + w·[(ρ_w − 1/(2β))² + (ρ_l + 1/(2β))²]",
    source="Xiao et al. 2024 (Cal-DPO)",
    checked="TRL `sigmoid` plus `sppo_hard`; formula, gradient by hand, finite differences",
)


@dataclass(frozen=True)
class HingeConfig(PairConfig):
    block = "hinge"

    beta: float = key(0.1, "reward per nat of log-ratio to the reference", low=0, exclusive=True)


def hinge_loss(chosen: Terms, rejected: Terms, config: HingeConfig) -> Tensor:
    """max(0, 1 - beta Delta)."""
    return relu(1 - config.beta * (chosen.rho - rejected.rho))


HINGE = Objective(
    name="hinge",
    config_type=HingeConfig,
    loss=loss_of_pairs(hinge_loss, beta_rho),
    needs=WITH_REFERENCE,
    formula="max(0, 1 − βΔ)",
    source="Liu et al. 2023 (RSO), the hinge loss on normalized likelihoods",
    checked="TRL `hinge`; formula, gradient by hand, finite differences",
)


@dataclass(frozen=True)
class DPOPConfig(PairConfig):
    block = "dpop"

    beta: float = key(0.3, "reward per nat of log-ratio to the reference", low=0, exclusive=True)
    lam: float = key(50.0, "lambda: penalty on the chosen response falling below the reference", low=0)


def dpop_loss(chosen: Terms, rejected: Terms, config: DPOPConfig) -> Tensor:
    """-ls(beta (Delta - lambda max(0, -rho_w)))."""
    return -logsigmoid(config.beta * (chosen.rho - rejected.rho - config.lam * relu(-chosen.rho)))


DPOP = Objective(
    name="dpop",
    config_type=DPOPConfig,
    loss=loss_of_pairs(dpop_loss, beta_rho),
    needs=WITH_REFERENCE,
    formula="−lσ(β(Δ − λ·max(0, −ρ_w)))",
    source="Pal et al. 2024 (Smaug), Eq. 3",
    checked="formula, gradient by hand, finite differences",
)


@dataclass(frozen=True)
class DPOShiftConfig(PairConfig):
    block = "dpo_shift"

    beta: float = key(0.01, "reward per nat of log-ratio to the reference", low=0, exclusive=True)
    f: float = key(0.95, "weight of the rejected response's reward; 1 is dpo", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.f == 0:
            raise UserError("model.dpo_shift.f=0: must be > 0, since 0 would ignore the rejected response")


def dpo_shift_loss(chosen: Terms, rejected: Terms, config: DPOShiftConfig) -> Tensor:
    """-ls(beta (rho_w - f rho_l))."""
    return -logsigmoid(config.beta * (chosen.rho - config.f * rejected.rho))


DPO_SHIFT = Objective(
    name="dpo_shift",
    config_type=DPOShiftConfig,
    loss=loss_of_pairs(dpo_shift_loss, beta_rho),
    needs=WITH_REFERENCE,
    formula="−lσ(β(ρ_w − f·ρ_l))",
    source="Yang et al. 2025 (DPO-Shift)",
    checked="formula, gradient by hand, finite differences",
)


@dataclass(frozen=True)
class RDPOConfig(PairConfig):
    block = "r_dpo"

    beta: float = key(0.1, "reward per nat of log-ratio to the reference", low=0, exclusive=True)
    alpha: float = key(0.05, "reward penalty per token of length", low=0)


def r_dpo_loss(chosen: Terms, rejected: Terms, config: RDPOConfig) -> Tensor:
    """-ls(beta Delta + alpha (|y_w| - |y_l|))."""
    longer = chosen.length - rejected.length
    return -logsigmoid(config.beta * (chosen.rho - rejected.rho) + config.alpha * longer)


R_DPO = Objective(
    name="r_dpo",
    config_type=RDPOConfig,
    loss=loss_of_pairs(r_dpo_loss, beta_rho),
    needs=WITH_REFERENCE,
    formula="−lσ(βΔ + α(|y_w| − |y_l|))",
    source="Park et al. 2024 (R-DPO)",
    checked="formula, gradient by hand, finite differences",
)


@dataclass(frozen=True)
class SPPOConfig(PairConfig):
    block = "sppo"

    eta: float = key(1000.0, "target log-ratios are eta (P - 1/2) nats; TRL's 1 / beta", low=0, exclusive=True)
    win_probability: str = key(
        "labels",
        "P: labels: 1 for the chosen, 0 for the rejected response; rewards: the explicit reward, from 0 to 1; "
        "bradley_terry: logistic of the difference of rewards",
        choices=("labels", "rewards", "bradley_terry"),
    )


def sppo_loss(chosen: Terms, rejected: Terms, config: SPPOConfig) -> Tensor:
    """(rho_w - eta (P_w - 1/2))^2 + (rho_l - eta (P_l - 1/2))^2."""
    wins, losses = torch.ones_like(chosen.rho), torch.zeros_like(chosen.rho)
    if config.win_probability == "rewards":
        wins, losses = chosen.reward, rejected.reward
    elif config.win_probability == "bradley_terry":
        wins = torch.sigmoid(chosen.reward - rejected.reward)
        losses = 1 - wins
    return (chosen.rho - config.eta * (wins - 0.5)).square() + (rejected.rho - config.eta * (losses - 0.5)).square()


def require_probabilities(config: SPPOConfig, rewards: RewardSummary) -> SPPOConfig:
    """Reject rewards outside [0, 1] if they are used as win probabilities."""
    if config.win_probability == "rewards" and rewards.low is not None and rewards.high is not None:
        for reward in (rewards.low, rewards.high):
            if not 0 <= reward <= 1:
                raise UserError(
                    f"model.sppo.win_probability=rewards: the data has a reward of {reward:g}, which is not a "
                    "probability. Set it to bradley_terry or labels, or use another data.reward_field."
                )
    return config


def mean_target_of_sppo(config: SPPOConfig, rewards: RewardSummary) -> MeanTarget | None:
    """eta (mean P - 1/2), which is 0 for labels and Bradley-Terry."""
    if config.win_probability != "rewards" or rewards.mean is None:
        return None
    return MeanTarget(config.eta * (rewards.mean - 0.5), "model.sppo.win_probability=bradley_terry")


def sppo_needs(config: SPPOConfig) -> Needs:
    """Requirements; rewards are not needed with labels."""
    return Needs(
        reference=True, preference=True, pairs=True, min_responses=2, rewards=config.win_probability != "labels"
    )


SPPO = Objective(
    name="sppo",
    config_type=SPPOConfig,
    loss=loss_of_pairs(sppo_loss, lambda responses, config: responses.rho / config.eta),
    needs=sppo_needs,
    formula="(ρ_w − η(P_w − ½))² + (ρ_l − η(P_l − ½))²",
    source="Wu et al. 2024 (SPPO)",
    checked="TRL `sppo_hard` (labels, η = 1/β); formula, gradient by hand, finite differences",
    resolve=require_probabilities,
    mean_target=mean_target_of_sppo,
)
