"""RPO's special cases, value and gradient: the paper's claim that its distances hold the other objectives."""

import math

import pytest
import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch
from nemo_rao.objectives.registry import OBJECTIVES

from .batches import loss_and_gradients, make_batch
from .formulas import answers_of, best_of, log_softmax

EXACT = {"rtol": 1e-10, "atol": 1e-12}
BETA = 0.3
PAIRS = (2, 2, 2)
GROUPS = (2, 3, 1, 4)
CERTAIN = {"explicit": "constant", "gap": 1e4}  # of the best response, in the limit


def value_and_gradient(name: str, batch: ObjectiveBatch, **keys: object) -> tuple[Tensor, Tensor, Tensor]:
    """``loss_sum, num_prompts, d loss_sum / d response_logps``."""
    output, _, gradient = loss_and_gradients(OBJECTIVES[name], batch, OBJECTIVES[name].make_config(keys))
    assert gradient.abs().max() > 1e-4, "or equal gradients would say nothing"
    return output.loss_sum.detach(), output.num_prompts, gradient


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("sft_weight", [0.0, 0.2])
def test_dpo_is_backward_kl_from_a_certain_preference(ranked: bool, sft_weight: float) -> None:
    batch = make_batch(1, PAIRS, ranked)
    rpo = value_and_gradient("rpo", batch, distance="bwd", beta=BETA, **CERTAIN, sft_weight=sft_weight)
    dpo = value_and_gradient("dpo", batch, beta=BETA, sft_weight=sft_weight)
    torch.testing.assert_close(rpo, dpo, **EXACT)


@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_cdpo_is_backward_kl_from_an_uncertain_preference_plus_its_entropy(epsilon: float) -> None:
    batch = make_batch(1, PAIRS)
    gap = math.log((1 - epsilon) / epsilon)
    entropy = -(1 - epsilon) * math.log(1 - epsilon) - epsilon * math.log(epsilon)
    rpo_loss, num, rpo_gradient = value_and_gradient(
        "rpo", batch, distance="bwd", beta=BETA, explicit="constant", gap=gap
    )
    dpo_loss, _, dpo_gradient = value_and_gradient("dpo", batch, beta=BETA, label_smoothing=epsilon)
    torch.testing.assert_close(dpo_loss, rpo_loss + num * entropy, **EXACT)
    torch.testing.assert_close(dpo_gradient, rpo_gradient, **EXACT)


@pytest.mark.parametrize("length_normalized", [False, True])
def test_ipo_is_squared_distance_from_a_gap_of_one_half_divided_by_beta_squared(length_normalized: bool) -> None:
    batch, keys = make_batch(1, PAIRS), {"beta": BETA, "length_normalized": length_normalized}
    rpo_loss, num, rpo_gradient = value_and_gradient("rpo", batch, distance="sq", explicit="constant", gap=0.5, **keys)
    ipo = value_and_gradient("ipo", batch, **keys)
    torch.testing.assert_close((rpo_loss / BETA**2, num, rpo_gradient / BETA**2), ipo, **EXACT)


def test_robust_po_is_squared_distance_from_the_rewards_for_any_number_of_responses() -> None:
    batch = make_batch(1, GROUPS)
    rpo = value_and_gradient("rpo", batch, distance="sq", beta=BETA, eta=1.0)
    torch.testing.assert_close(rpo, value_and_gradient("robust_po", batch, beta=BETA), **EXACT)


@pytest.mark.parametrize("ranked", [False, True])
def test_simpo_is_backward_kl_of_mean_log_probabilities_with_a_margin(ranked: bool) -> None:
    batch = make_batch(1, PAIRS, ranked)
    without_reference = {"use_reference": False, "length_normalized": True}
    rpo = value_and_gradient("rpo", batch, distance="bwd", beta=2.5, margin=0.7, **CERTAIN, **without_reference)
    torch.testing.assert_close(rpo, value_and_gradient("simpo", batch, beta=2.5, gamma=0.7), **EXACT)


def test_leave_one_out_distance_is_the_squared_distance_of_two() -> None:
    batch, keys = make_batch(1, PAIRS), {"beta": BETA, "eta": 0.7, "margin": 0.2}
    loo = value_and_gradient("rpo", batch, distance="sqloo", **keys)
    torch.testing.assert_close(loo, value_and_gradient("rpo", batch, distance="sq", **keys), **EXACT)


@pytest.mark.parametrize("eta", [1.0, 2.5])
def test_leave_one_out_distance_descends_along_rloo(eta: float) -> None:
    """RLOO: the loss of a prompt is -sum_k A_k logp(y_k), A_k = R_k - mean of the others' R, R = r - kl_coef rho.

    With kl_coef = beta/eta, R = -d/eta for the d = beta rho - eta r of RPO, so A_k = -(d_k - mean of the others)/eta.
    d_k - mean of the others' d = K/(K - 1) (d_k - mean d), hence

        d sqloo / d logp(y_k) = beta (K/(K - 1))^2 (d_k - mean d) = -beta eta K/(K - 1) A_k

    for every sample, not only in expectation. (With RLOO's mean over responses in place of the sum: times K once more.)
    """
    batch, kl_coef = make_batch(1, GROUPS), BETA / eta
    _, _, gradient = value_and_gradient("rpo", batch, distance="sqloo", beta=BETA, eta=eta)
    rloo = torch.zeros_like(gradient)
    for answers in answers_of(batch):
        num = len(answers)
        returns = [answer.reward - kl_coef * answer.rho for answer in answers]
        for answer, of_answer in zip(answers, returns, strict=True):
            if num > 1:
                advantage = of_answer - (sum(returns) - of_answer) / (num - 1)
                rloo[answer.row, answer.column] = -advantage * BETA * eta * num / (num - 1)
    torch.testing.assert_close(gradient, rloo, **EXACT)


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_backward_kl_over_all_responses_is_info_nca_less_the_entropy_of_the_rewards(alpha: float) -> None:
    """InfoNCA: the cross entropy of softmax(r/alpha) against softmax(beta rho)."""
    batch = make_batch(1, GROUPS)
    loss, num, gradient = value_and_gradient("rpo", batch, distance="bwd", beta=BETA, eta=1 / alpha)
    cross_entropy = entropy = 0.0
    by_hand = torch.zeros_like(gradient)
    for answers in answers_of(batch):
        if len(answers) < 2:
            continue
        log_p = log_softmax([BETA * answer.rho for answer in answers])
        log_q = log_softmax([answer.reward / alpha for answer in answers])
        for answer, of_p, of_q in zip(answers, log_p, log_q, strict=True):
            cross_entropy -= math.exp(of_q) * of_p
            entropy -= math.exp(of_q) * of_q
            by_hand[answer.row, answer.column] = BETA * (math.exp(of_p) - math.exp(of_q))
    assert num == 3
    torch.testing.assert_close(loss.item(), cross_entropy - entropy, **EXACT)
    torch.testing.assert_close(gradient, by_hand, **EXACT)


def test_dpo_of_many_responses_is_the_best_against_all_others() -> None:
    """Backward KL from a certain preference: -log softmax(beta rho) of the best response."""
    batch = make_batch(1, GROUPS)
    loss, _, _ = value_and_gradient("rpo", batch, distance="bwd", beta=BETA, **CERTAIN)
    expected = 0.0
    for answers in answers_of(batch):
        if len(answers) > 1:
            best = answers.index(best_of(answers))  # type: ignore[arg-type]
            expected -= log_softmax([BETA * answer.rho for answer in answers])[best]
    torch.testing.assert_close(loss.item(), expected, **EXACT)


@pytest.mark.parametrize("distance", ["fwd", "bwd"])
def test_near_agreement_both_divergences_are_half_the_variance_of_the_difference(distance: str) -> None:
    """KL = 1/2 Var_p(a - b) + O(|a - b|^3), by which the squared distances are their second-order form."""
    batch = make_batch(1, (3, 4, 2))
    small = 1e-3
    assert batch.reference_response_logps is not None
    rho = torch.where(batch.valid, (batch.rewards + small * torch.sin(3 * batch.rewards)) / BETA, 0)
    near = ObjectiveBatch(**vars(batch) | {"response_logps": batch.reference_response_logps + rho})
    output = OBJECTIVES["rpo"].loss(near, OBJECTIVES["rpo"].make_config({"distance": distance, "beta": BETA}))
    expected = 0.0
    for answers in answers_of(near):
        p = [math.exp(log_p) for log_p in log_softmax([answer.reward for answer in answers])]
        d = [BETA * answer.rho - answer.reward for answer in answers]
        center = sum(of_p * of_d for of_p, of_d in zip(p, d, strict=True))
        expected += sum(of_p * (of_d - center) ** 2 for of_p, of_d in zip(p, d, strict=True)) / 2
    torch.testing.assert_close(output.loss_sum.item(), expected, rtol=5e-3, atol=0)
