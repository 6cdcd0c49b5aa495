"""Pairwise losses without a reference policy: slic, simpo, alphapo, orpo.

Each function computes the loss of one pair; :mod:`nemo_rao.objectives.pair_loss` reduces it and defines logp and |y|.
mean logp = logp / |y|, ls = log of the logistic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from nemo_rao.keys import key
from nemo_rao.objectives.base import Objective
from nemo_rao.objectives.pair_loss import WITHOUT_REFERENCE, PairConfig, Terms, loss_of_pairs


@dataclass(frozen=True)
class SLiCConfig(PairConfig):
    block = "slic"

    delta: float = key(1.0, "target margin of the log-probabilities, nats", low=0)
    lam: float = key(0.1, "lambda: weight of the chosen response's negative log-probability, summed over tokens", low=0)


def slic_loss(chosen: Terms, rejected: Terms, config: SLiCConfig) -> Tensor:
    """max(0, delta - logp(w) + logp(l)) - lambda logp(w)."""
    return relu(config.delta - chosen.logp + rejected.logp) - config.lam * chosen.logp


SLIC = Objective(
    name="slic",
    config_type=SLiCConfig,
    loss=loss_of_pairs(slic_loss, lambda responses, config: responses.logp),
    needs=WITHOUT_REFERENCE,
    formula="max(0, δ − logπ(w) + logπ(l)) − λ·logπ(w)",
    source="Zhao et al. 2023 (SLiC-HF), regularized on the chosen response",
    checked="TRL's CPO `hinge` plus its NLL; formula, gradient by hand, finite differences",
)


@dataclass(frozen=True)
class SimPOConfig(PairConfig):
    block = "simpo"

    beta: float = key(2.0, "reward per nat of log-probability per token", low=0, exclusive=True)
    gamma: float = key(1.0, "target margin of the rewards", low=0)


def simpo_loss(chosen: Terms, rejected: Terms, config: SimPOConfig) -> Tensor:
    """-ls(beta (mean logp(w) - mean logp(l)) - gamma)."""
    return -logsigmoid(config.beta * (chosen.mean_logp - rejected.mean_logp) - config.gamma)


SIMPO = Objective(
    name="simpo",
    config_type=SimPOConfig,
    loss=loss_of_pairs(simpo_loss, lambda responses, config: config.beta * responses.mean_logp),
    needs=WITHOUT_REFERENCE,
    formula="−lσ(β(logπ(w)/|w| − logπ(l)/|l|) − γ)",
    source="Meng et al. 2024 (SimPO), Eq. 6",
    checked="TRL `simpo`; formula, gradient by hand, finite differences",
)


@dataclass(frozen=True)
class AlphaPOConfig(PairConfig):
    block = "alphapo"

    alpha: float = key(0.25, "shape of the reward; 0: logarithm, as in simpo")
    beta: float = key(2.5, "scale of the reward", low=0, exclusive=True)
    gamma: float = key(0.1, "target margin of the rewards", low=0)


def alphapo_reward(mean_logp: Tensor, alpha: float) -> Tensor:
    """R = (1 - p^-alpha) / alpha with p = exp(mean logp), computed as -expm1(-alpha mean logp) / alpha.

    **Choice** Above e^40 the power is continued by its tangent, so that R and its gradient stay finite in float32.
    """
    if alpha == 0:
        return mean_logp
    exponent = -alpha * mean_logp
    capped = exponent.clamp(max=40.0)
    beyond = (exponent - capped) * capped.detach().exp()
    return -(torch.expm1(capped) + beyond) / alpha


def alphapo_loss(chosen: Terms, rejected: Terms, config: AlphaPOConfig) -> Tensor:
    """-ls(beta (R_w - R_l) - gamma)."""
    margin = alphapo_reward(chosen.mean_logp, config.alpha) - alphapo_reward(rejected.mean_logp, config.alpha)
    return -logsigmoid(config.beta * margin - config.gamma)


ALPHAPO = Objective(
    name="alphapo",
    config_type=AlphaPOConfig,
    loss=loss_of_pairs(
        alphapo_loss, lambda responses, config: config.beta * alphapo_reward(responses.mean_logp, config.alpha)
    ),
    needs=WITHOUT_REFERENCE,
    formula="−lσ(β(R_w − R_l) − γ), R = (1 − p^−α)/α, p = exp(logπ(y)/|y|); α = 0: simpo",
    source="Gupta et al. 2025 (AlphaPO)",
    checked="TRL `alphapo`, where that is finite; formula, gradient by hand, finite differences",
)


@dataclass(frozen=True)
class ORPOConfig(PairConfig):
    block = "orpo"

    lam: float = key(0.1, "lambda: weight of the odds ratio relative to the negative log-likelihood; TRL's beta", low=0)


def log_odds(mean_logp: Tensor) -> Tensor:
    """log(p / (1 - p)) with p = exp(mean logp), exact for p near 0 and near 1.

    **Choice** 1 - p is clamped to at least 1e-6: a response with probability 1 has zero gradient instead of NaN.
    """
    mean_logp = mean_logp.clamp(max=-1e-6)
    near_one = mean_logp > -0.6931471805599453
    # Each branch gets inputs at which it is finite; otherwise torch.where would pass on NaN gradients.
    of_large = torch.log(-torch.expm1(torch.where(near_one, mean_logp, -0.5)))
    of_small = torch.log1p(-torch.exp(torch.where(near_one, -1.0, mean_logp)))
    return mean_logp - torch.where(near_one, of_large, of_small)


def orpo_loss(chosen: Terms, rejected: Terms, config: ORPOConfig) -> Tensor:
    """-mean logp(w) - lambda ls(log odds(w) - log odds(l)).

    TRL's first term also covers the prompt's tokens and is averaged over all tokens of a batch.
    """
    ratio = log_odds(chosen.mean_logp) - log_odds(rejected.mean_logp)
    return -chosen.mean_logp - config.lam * logsigmoid(ratio)


def _orpo_reward(responses: Terms, config: Any) -> Tensor:
    return config.lam * responses.mean_logp


ORPO = Objective(
    name="orpo",
    config_type=ORPOConfig,
    loss=loss_of_pairs(orpo_loss, _orpo_reward),
    needs=WITHOUT_REFERENCE,
    formula="−logπ(w)/|w| − λ·lσ(log odds(w) − log odds(l)), odds = p/(1−p), p = exp(logπ(y)/|y|)",
    source="Hong et al. 2024 (ORPO), Eq. 6 and 7",
    checked="TRL's ORPO; formula, gradient by hand, finite differences",
)
