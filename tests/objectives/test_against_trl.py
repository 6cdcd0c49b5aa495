"""Objectives that TRL has too, held against TRL's own code: value, and gradient to every response's log-probability."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch
from nemo_rao.objectives.registry import OBJECTIVES

from . import trl_reference as trl
from .batches import loss_and_gradients, make_batch
from .trl_reference import Loss, one_pair_at_a_time

LARGE_GAP = 60.0  # nats: e^-60 is nothing beside 1e-10
EPSILON = 0.2
LOG_ODDS = math.log((1 - EPSILON) / EPSILON)
ENTROPY = -(1 - EPSILON) * math.log(1 - EPSILON) - EPSILON * math.log(EPSILON)


@dataclass(frozen=True)
class Case:
    """loss of our ``objective`` under ``keys`` = factor * TRL's loss + offset."""

    objective: str
    keys: dict[str, Any]
    theirs: Loss
    factor: float = 1.0
    offset: float = 0.0


def pairs(num_prompts: int = 12) -> ObjectiveBatch:
    """Labeled pairs without rewards, chosen first; means per token from -3 to 0 nats, log-ratios from -8 to 8."""
    batch = make_batch(num_responses=(2,) * num_prompts, ranked=True)
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(2, num_prompts, 2, generator=generator, dtype=torch.float64)
    logps = -3 * uniform[0] ** 3 * batch.lengths
    return dataclasses.replace(
        batch,
        response_logps=logps,
        reference_response_logps=logps + 16 * uniform[1] - 8,
        rewards=torch.full_like(batch.rewards, torch.nan),
    )


def test_pairs_reach_both_branches_of_every_loss_that_has_two() -> None:
    batch = pairs()
    log_ratios = batch.response_logps - batch.reference_response_logps
    for name, branch in {
        "hinge, with beta 0.2": log_ratios[:, 0] - log_ratios[:, 1] < 1 / 0.2,
        "slic, with delta 8": batch.response_logps[:, 0] - batch.response_logps[:, 1] < 8.0,
        "orpo: log(1 - p)": batch.response_logps / batch.lengths < -math.log(2),
    }.items():
        assert branch.any() and not branch.all(), name


def assert_same(batch: ObjectiveBatch, case: Case) -> None:
    """The mean over prompts and its gradient, to 1e-10 of every number."""
    objective = OBJECTIVES[case.objective]
    output, prompt_gradient, gradient = loss_and_gradients(objective, batch, objective.make_config(case.keys))
    loss, expected_gradient = trl_loss(batch, case.theirs)
    exactly = {"rtol": 1e-10, "atol": 0.0}
    torch.testing.assert_close(output.loss_sum / output.num_prompts, case.factor * loss + case.offset, **exactly)
    torch.testing.assert_close(gradient / output.num_prompts, case.factor * expected_gradient, **exactly)
    assert expected_gradient.any() and not prompt_gradient.any()


def trl_loss(batch: ObjectiveBatch, theirs: Loss) -> tuple[Tensor, Tensor]:
    """TRL's mean over pairs, and its gradient ``[P, 2]``."""
    logps = batch.response_logps.clone().requires_grad_()
    loss = theirs(batch, logps)
    assert loss.dtype == logps.dtype
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


def of_single_tokens(theirs: Loss) -> Loss:
    """Every response taken as one token: what TRL divides by |y| it then leaves as it is."""
    return lambda batch, logps: theirs(dataclasses.replace(batch, lengths=torch.ones_like(batch.lengths)), logps)


def cal_dpo(batch: ObjectiveBatch, logps: Tensor) -> Tensor:
    """Cal-DPO with beta 0.05 and weight 0.5, put together from DPO without a beta and SPPO."""
    return trl.dpo("sigmoid", beta=1.0)(batch, logps) + 0.5 * trl.dpo("sppo_hard", beta=0.05)(batch, logps)


def slic(delta: float, lam: float) -> Loss:
    """SLiC of CPO's hinge and its negative log-likelihood, which is per token where SLiC's is summed."""

    def one_pair(batch: ObjectiveBatch, logps: Tensor) -> Tensor:
        nll_weight = lam * float(batch.lengths[0, 0]) / delta
        return delta * trl.cpo("hinge", beta=1 / delta, nll_weight=nll_weight)(batch, logps)

    return one_pair_at_a_time(one_pair)


# aot is cDPO of sorted log-ratios, so cDPO for a single pair. sft and orpo take the mean over all tokens of a batch,
# where ours is over each response's and then over prompts: for a single pair they are the same.
PAIRWISE = {
    "dpo is sigmoid": Case("dpo", {"beta": 0.3}, trl.dpo("sigmoid", beta=0.3)),
    "dpo with label_smoothing is aot of a pair": Case(
        "dpo",
        {"beta": 0.3, "label_smoothing": EPSILON},
        one_pair_at_a_time(trl.dpo("aot", beta=0.3, label_smoothing=EPSILON)),
    ),
    "robust dpo is robust": Case(
        "dpo",
        {"beta": 0.3, "label_smoothing": EPSILON, "robust": True},
        trl.dpo("robust", beta=0.3, label_smoothing=EPSILON),
    ),
    "sft_weight is sft beside sigmoid": Case(
        "dpo", {"beta": 0.3, "sft_weight": 0.7}, one_pair_at_a_time(trl.dpo("sigmoid", beta=0.3, sft_weight=0.7))
    ),
    "sft is sft": Case("sft", {}, one_pair_at_a_time(trl.dpo("sft", beta=1.0))),
    "ipo by length is ipo": Case("ipo", {"beta": 0.4, "length_normalized": True}, trl.dpo("ipo", beta=0.4)),
    "ipo is ipo of single tokens": Case("ipo", {"beta": 0.4}, of_single_tokens(trl.dpo("ipo", beta=0.4))),
    "hinge is hinge": Case("hinge", {"beta": 0.2}, trl.dpo("hinge", beta=0.2)),
    "sppo with labels is sppo_hard, eta 1 / beta": Case("sppo", {"eta": 1 / 0.05}, trl.dpo("sppo_hard", beta=0.05)),
    "cal_dpo is sigmoid and sppo_hard": Case("cal_dpo", {"beta": 0.05, "calibration_weight": 0.5}, cal_dpo),
    "nca with labels is nca_pair": Case("nca", {"beta": 0.3}, trl.dpo("nca_pair", beta=0.3)),
    "simpo is simpo": Case("simpo", {"beta": 2.0, "gamma": 0.7}, trl.cpo("simpo", beta=2.0, gamma=0.7)),
    "alphapo is simpo with alpha": Case(
        "alphapo",
        {"alpha": 0.25, "beta": 2.5, "gamma": 0.1},
        trl.cpo("simpo", beta=2.5, gamma=0.1, alpha=0.25),
    ),
    "alphapo with alpha < 0": Case(
        "alphapo",
        {"alpha": -0.5, "beta": 2.5, "gamma": 0.1},
        trl.cpo("simpo", beta=2.5, gamma=0.1, alpha=-0.5),
    ),
    "alphapo without alpha is simpo": Case(
        "alphapo", {"alpha": 0.0, "beta": 2.0, "gamma": 0.7}, trl.cpo("simpo", beta=2.0, gamma=0.7)
    ),
    "orpo is orpo": Case("orpo", {"lam": 0.3}, one_pair_at_a_time(trl.orpo(beta=0.3))),
    "slic is hinge of cpo": Case("slic", {"delta": 8.0, "lam": 0.3}, slic(delta=8.0, lam=0.3)),
}


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_loss_of_pairs_equals_trls(name: str) -> None:
    assert_same(pairs(), PAIRWISE[name])


def rpo(distance: str, beta: float, gap: float, **keys: Any) -> dict[str, Any]:
    """Keys of RPO with constants in place of rewards."""
    return {"distance": distance, "beta": beta, "explicit": "constant", "gap": gap, **keys}


RPO = {
    "bwd, large gap: dpo": Case("rpo", rpo("bwd", 0.3, LARGE_GAP), trl.dpo("sigmoid", beta=0.3)),
    "bwd, gap of the odds: cDPO but for the labels' entropy": Case(
        "rpo",
        rpo("bwd", 0.3, LOG_ODDS),
        one_pair_at_a_time(trl.dpo("aot", beta=0.3, label_smoothing=EPSILON)),
        offset=-ENTROPY,
    ),
    "bwd by length, large gap: sigmoid_norm": Case(
        "rpo", rpo("bwd", 3.0, LARGE_GAP, length_normalized=True), trl.dpo("sigmoid_norm", beta=3.0)
    ),
    "bwd by length, large gap, no reference: simpo": Case(
        "rpo",
        rpo("bwd", 2.0, LARGE_GAP, length_normalized=True, use_reference=False, margin=0.7),
        trl.cpo("simpo", beta=2.0, gamma=0.7),
    ),
    "bwd, gap of the odds, no reference: cpo but for the labels' entropy": Case(
        "rpo",
        rpo("bwd", 0.1, LOG_ODDS, use_reference=False),
        trl.cpo("sigmoid", beta=0.1, label_smoothing=EPSILON),
        offset=-ENTROPY,
    ),
    "fwd, gap of the odds: exo": Case(
        "rpo", rpo("fwd", 0.3, LOG_ODDS), trl.dpo("exo_pair", beta=0.3, label_smoothing=EPSILON)
    ),
    "sq by length, gap 1/2: ipo": Case(
        "rpo", rpo("sq", 0.4, 0.5, length_normalized=True), trl.dpo("ipo", beta=0.4), factor=0.4**2
    ),
    "sqloo by length, gap 1/2: ipo": Case(
        "rpo", rpo("sqloo", 0.4, 0.5, length_normalized=True), trl.dpo("ipo", beta=0.4), factor=0.4**2
    ),
}


@pytest.mark.parametrize("name", RPO)
def test_a_corner_of_rpo_equals_trls_loss(name: str) -> None:
    assert_same(pairs(), RPO[name])


@pytest.mark.parametrize("z0", [2.0, 0.0, -2.0])
@pytest.mark.parametrize("labels", ["order", "rewards", "threshold"])
def test_kto_equals_trls_whatever_says_which_responses_are_desirable(labels: str, z0: float) -> None:
    """z0 < 0 becomes 0 in both."""
    keys = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    case = Case("kto", keys, trl.kto(z0=z0, **keys))
    batch = dataclasses.replace(pairs(), kl_estimate=torch.tensor(z0, dtype=torch.float64))
    if labels != "order":
        good, bad = {"rewards": (1.0, 0.0), "threshold": (7.5, 6.5)}[labels]
        batch.rewards[:] = torch.tensor([good, bad])
        batch = dataclasses.replace(batch, ranked=torch.zeros_like(batch.ranked))
    if labels == "threshold":
        case = dataclasses.replace(case, keys={**keys, "threshold": 7.0})
    assert_same(batch, case)


def test_nca_with_rewards_tends_to_nca_pair_as_alpha_vanishes() -> None:
    batch = pairs()
    batch.rewards[:] = torch.tensor([2.0, 1.0])
    batch = dataclasses.replace(batch, ranked=torch.zeros_like(batch.ranked))
    assert_same(batch, Case("nca", {"beta": 0.3, "alpha": 0.01}, trl.dpo("nca_pair", beta=0.3)))


# ------------------------------------------------------------------------------------------- where TRL is different


def test_trls_sigmoid_ignores_label_smoothing_where_dpo_does_not() -> None:
    batch, objective = pairs(), OBJECTIVES["dpo"]
    theirs = trl.dpo("sigmoid", beta=0.3, label_smoothing=EPSILON)
    assert_same(batch, Case("dpo", {"beta": 0.3}, theirs))
    smoothed = objective.loss(batch, objective.make_config({"beta": 0.3, "label_smoothing": EPSILON}))
    assert (smoothed.loss_sum / smoothed.num_prompts - trl_loss(batch, theirs)[0]).abs() > 0.01


def test_trls_alphapo_is_nan_for_improbable_responses_where_ours_is_finite() -> None:
    """TRL raises exp(mean logp) to a power: below -104 nats that is 0 in float32, and its power infinite."""
    batch = dataclasses.replace(pairs(2), lengths=torch.ones(2, 2), response_logps=torch.tensor([[-110.0, -120.0]] * 2))
    trainer = trl.make_trainer(
        trl.CPOTrainer, loss_type="simpo", beta=2.5, simpo_gamma=0.1, alpha=0.25, label_smoothing=0.0
    )
    losses, _, _ = trainer.cpo_loss(batch.response_logps[:, 0], batch.response_logps[:, 1])
    assert losses.isnan().all()
    objective = OBJECTIVES["alphapo"]
    output, _, gradient = loss_and_gradients(objective, batch, objective.make_config({}))
    assert output.loss_sum.dtype == torch.float32 and output.loss_sum.isfinite() and gradient.isfinite().all()


def test_trls_orpo_counts_all_tokens_of_a_batch_alike_where_ours_counts_responses_alike() -> None:
    batch, objective = pairs(), OBJECTIVES["orpo"]
    output = objective.loss(batch, objective.make_config({"lam": 0.0}))
    chosen, lengths = batch.response_logps[:, 0], batch.lengths[:, 0]
    torch.testing.assert_close(trl_loss(batch, trl.orpo(beta=0.0))[0], -chosen.sum() / lengths.sum())
    torch.testing.assert_close(output.loss_sum / output.num_prompts, -(chosen / lengths).mean())


def test_trls_bco_pair_has_no_shift() -> None:
    """BCO would subtract the mean reward from every reward, and not change where all log-ratios fall alike."""
    batch, theirs = pairs(), trl.dpo("bco_pair", beta=0.3)
    fallen = dataclasses.replace(batch, response_logps=batch.response_logps - 1.0)
    assert (trl_loss(batch, theirs)[0] - trl_loss(fallen, theirs)[0]).abs() > 0.01
