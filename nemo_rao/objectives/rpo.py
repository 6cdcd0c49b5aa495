"""RPO, Reward-aware Preference Optimization, a family of losses (Sun et al. 2025, arXiv 2502.00203).

    a_k = beta * rho(y_k), the implicit rewards;  b_k = eta * r_k, the explicit ones;  d = a - b
    bwd     KL(softmax(b) || softmax(a)),    d/da_k = softmax(a)_k - softmax(b)_k
    fwd     KL(softmax(a) || softmax(b))
    sqloo   1/2 sum_k (d_k - mean of the other d)^2 = 1/2 (K / (K-1))^2 sum_k (d_k - mean d)^2
    sq      (a_1 - a_2 - (b_1 - b_2))^2, which equals sqloo at K = 2

for one prompt, over its K responses. ``use_reference: false`` replaces rho by logp, ``length_normalized`` divides
either by \\|y\\|, and ``margin`` is subtracted from the best response's a. ``explicit: constant`` sets b = ``gap`` for
the best response and 0 for the others, for preferences without rewards.

DPO is bwd with a large gap, cDPO bwd with gap log((1-eps)/eps), IPO sq with gap 1/2, robust_po sq with eta 1, SimPO bwd
with a large gap, length-normalized, without reference and with a margin; on K responses bwd is InfoNCA.

**Choice** For K > 2, sq is the mean of (d_i - d_j)^2 over pairs. Prompts with a single response are left out, as are,
with ``explicit: constant``, prompts without a preference (all rewards equal).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rao.batch import LossOutput, ObjectiveBatch
from nemo_rao.keys import key
from nemo_rao.objectives.base import Needs, Objective
from nemo_rao.objectives.metrics import shared_metrics
from nemo_rao.objectives.pair_loss import PairConfig, terms
from nemo_rao.objectives.pairs import best_and_worst, select_best, take
from nemo_rao.objectives.reductions import mean_of_responses, metric, rewarded, sum_of_prompt_means, sum_over_prompts

_IMPOSSIBLE = -1e30  # logit with softmax 0, finite so that its product with 0 is 0


@dataclass(frozen=True)
class RPOConfig(PairConfig):
    block = "rpo"

    distance: str = key("bwd", "distance between implicit and explicit rewards", choices=("bwd", "fwd", "sq", "sqloo"))
    beta: float = key(0.1, "implicit reward per nat of log-ratio (or log-probability)", low=0, exclusive=True)
    eta: float = key(1.0, "scale of the explicit rewards", low=0, exclusive=True)
    explicit: str = key(
        "rewards",
        "rewards: the data's rewards; constant: gap for the best response, 0 for the others",
        choices=("rewards", "constant"),
    )
    gap: float = key(1.0, "with explicit=constant: reward of the best response; the others have 0", low=0)
    use_reference: bool = key(True, "compute implicit rewards from log-ratios; false: from log-probabilities")
    length_normalized: bool = key(False, "divide log-ratios or log-probabilities by the number of response tokens")
    margin: float = key(0.0, "subtracted from the best response's implicit reward; simpo's gamma", low=0)


def rpo_loss(batch: ObjectiveBatch, config: RPOConfig) -> LossOutput:
    """Loss and metrics of P prompts with up to K responses.

    ``rpo/target_error``: mean over a prompt's pairs of \\|a_i - a_j - (b_i - b_j)\\|, then over prompts.
    """
    responses = terms(batch)
    if config.use_reference:
        implicit = config.beta * (responses.mean_rho if config.length_normalized else responses.rho)
    else:
        implicit = config.beta * (responses.mean_logp if config.length_normalized else responses.logp)
    best, any_valid = select_best(batch)
    is_best = torch.arange(batch.valid.shape[1], device=best.device) == best[:, None]
    if config.explicit == "constant":
        entries = batch.valid & best_and_worst(batch).valid[:, None]
        explicit = config.gap * is_best.to(implicit.dtype)
    else:
        entries = rewarded(batch)
        explicit = config.eta * torch.where(entries, batch.rewards, 0)
    counts = entries.sum(-1)
    valid = counts >= 2
    a = torch.where(entries, torch.where(is_best, implicit - config.margin, implicit), 0)
    b = torch.where(entries, explicit, 0)
    losses = DISTANCES[config.distance](a, b, entries)
    if config.sft_weight > 0:
        losses = losses - config.sft_weight * take(responses.mean_logp, best, valid & any_valid)
    loss_sum, num_prompts = sum_over_prompts(losses, valid)

    difference = a.detach() - b
    gaps = (difference[:, :, None] - difference[:, None, :]).abs()
    metrics = {
        "rpo/target_error": metric(sum_of_prompt_means(gaps, _pairs_of(entries))),
        **shared_metrics(batch, implicit),
    }
    return LossOutput(loss_sum, num_prompts, metrics)


def sq(a: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    """``[P]``, mean over pairs of (d_i - d_j)^2. As for all distances, arguments are ``[P, K]``, 0 where not valid."""
    difference = a - b
    squares = (difference[:, :, None] - difference[:, None, :]).square()
    pairs = _pairs_of(valid)
    return torch.where(pairs, squares, 0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def sqloo(a: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    """``[P]``, half the sum of squared differences between each d and the mean of the others."""
    difference, counts = a - b, valid.sum(-1).to(a.dtype)
    deviations = torch.where(valid, difference - mean_of_responses(difference, valid), 0)
    return 0.5 * (counts / (counts - 1).clamp(min=1)).square() * deviations.square().sum(-1)


def bwd(a: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    """``[P]``, KL(softmax(b) || softmax(a)), nats."""
    return _kl(_log_softmax(b, valid), _log_softmax(a, valid), valid)


def fwd(a: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    """``[P]``, KL(softmax(a) || softmax(b)), nats."""
    return _kl(_log_softmax(a, valid), _log_softmax(b, valid), valid)


DISTANCES = {"bwd": bwd, "fwd": fwd, "sq": sq, "sqloo": sqloo}


def _log_softmax(logits: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, logits, _IMPOSSIBLE).log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, log_p.exp() * (log_p - log_q), 0).sum(-1)


def _pairs_of(valid: Tensor) -> Tensor:
    """``[P, K, K]`` bool, true for two different valid responses, in either order."""
    different = ~torch.eye(valid.shape[-1], dtype=torch.bool, device=valid.device)
    return valid[:, :, None] & valid[:, None, :] & different


def rpo_needs(config: RPOConfig) -> Needs:
    """Requirements according to the keys; only sq needs pairs."""
    return Needs(
        reference=config.use_reference,
        rewards=config.explicit == "rewards",
        preference=True,
        pairs=config.distance == "sq",
        min_responses=2,
    )


RPO = Objective(
    name="rpo",
    config_type=RPOConfig,
    loss=rpo_loss,
    needs=rpo_needs,
    formula=(
        "a = βρ, b = ηr; `bwd`: KL(softmax b ‖ softmax a); `fwd`: KL(softmax a ‖ softmax b); "
        "`sqloo`: ½Σ_k(d_k − mean_{j≠k} d_j)², d = a − b; `sq`: (d_1 − d_2)²"
    ),
    source="Sun et al. 2025 (RPO), arXiv 2502.00203",
    checked="dpo, cdpo, ipo, simpo, robust_po, REINFORCE-LOO, InfoNCA as special cases; TRL; formula, gradient by hand",
)
