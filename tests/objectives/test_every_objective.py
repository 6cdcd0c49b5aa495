"""What holds for every objective of the registry, whatever its formula."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rao.batch import RewardSummary
from nemo_rao.errors import UserError
from nemo_rao.objectives.registry import OBJECTIVES, get, table

from .batches import (
    GRADIENT_FIELDS,
    loss_and_gradients,
    make_batch,
    make_config,
    masked,
    permute_responses,
    select,
    with_tokens,
)

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
NAMES = st.sampled_from(sorted(OBJECTIVES))
SEEDS = st.integers(0, 2**16)
COUNTS = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)
fast = settings(max_examples=60, derandomize=True)


def sums(name: str, batch):  # type: ignore[no-untyped-def]
    """All of a loss's sums in one tensor, and both gradients."""
    objective = OBJECTIVES[name]
    output, *gradients = loss_and_gradients(objective, batch, make_config(objective))
    metrics = [output.metrics[key] for key in sorted(output.metrics)]
    return torch.cat([torch.stack([output.loss_sum.detach(), output.num_prompts]), *metrics]), *gradients


@fast
@given(name=NAMES, seed=SEEDS, counts=COUNTS, data=st.data())
def test_order_of_prompts_does_not_matter(name: str, seed: int, counts: tuple[int, ...], data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(counts)))))
    batch = make_batch(seed, counts)
    before, after = sums(name, batch), sums(name, select(batch, order))
    torch.testing.assert_close(after[0], before[0], **CLOSE)
    torch.testing.assert_close(after[1:], tuple(gradient[order] for gradient in before[1:]), **CLOSE)


@fast
@given(name=NAMES, seed=SEEDS, counts=COUNTS, data=st.data())
def test_order_of_responses_does_not_matter_with_rewards(
    name: str, seed: int, counts: tuple[int, ...], data: st.DataObject
) -> None:
    order = torch.tensor(data.draw(st.permutations(range(max(counts)))))
    batch = make_batch(seed, counts)
    before, after = sums(name, batch), sums(name, permute_responses(batch, order))
    torch.testing.assert_close(after[0], before[0], **CLOSE)
    torch.testing.assert_close(after[1:], tuple(gradient[:, order] for gradient in before[1:]), **CLOSE)


@fast
@given(name=NAMES, seed=SEEDS, counts=COUNTS, ranked=st.booleans(), data=st.data())
def test_micro_batches_add_up(name: str, seed: int, counts: tuple[int, ...], ranked: bool, data: st.DataObject) -> None:
    batch, everyone = make_batch(seed, counts, ranked), torch.arange(len(counts))
    cut = data.draw(st.integers(0, len(counts)))
    whole, first, second = sums(name, batch), *(sums(name, select(batch, p)) for p in (everyone[:cut], everyone[cut:]))
    torch.testing.assert_close(first[0] + second[0], whole[0], **CLOSE)
    for part in (1, 2):
        torch.testing.assert_close(torch.cat([first[part], second[part]]), whole[part], **CLOSE)


@fast
@given(name=NAMES, seed=SEEDS, counts=COUNTS, ranked=st.booleans(), garbage=st.sampled_from([1e30, -5.0, "nan", "inf"]))
def test_invalid_entries_have_no_effect_whatever_stands_there(
    name: str, seed: int, counts: tuple[int, ...], ranked: bool, garbage: float | str
) -> None:
    batch = make_batch(seed, (*counts, 5), ranked)  # a wider prompt, so that there are invalid entries
    before, after = sums(name, batch), sums(name, masked(batch, float(garbage)))
    assert all(map(torch.equal, before, after))
    assert not any(gradient[~batch.valid].any() for gradient in before[1:])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_prompt_without_responses_counts_for_nothing(name: str) -> None:
    batch = make_batch()
    empty = dataclasses.replace(batch, valid=batch.valid & (torch.arange(4) != 1)[:, None])
    before, after = sums(name, select(batch, torch.tensor([0, 2, 3]))), sums(name, empty)
    torch.testing.assert_close(after[0], before[0], **CLOSE)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_are_pairs_without_gradient_and_named_alike_for_every_batch(name: str) -> None:
    objective = OBJECTIVES[name]
    names = set()
    for counts in ((2, 3), (1,), (4, 1, 2)):
        batch = make_batch(num_responses=counts)
        for leaf in GRADIENT_FIELDS:
            getattr(batch, leaf).requires_grad_()
        metrics = objective.loss(batch, make_config(objective)).metrics
        assert all(pair.shape == (2,) and not pair.requires_grad for pair in metrics.values())
        names.add(tuple(metrics))
    assert len(names) == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_in_float32_out(name: str) -> None:
    objective, batch = OBJECTIVES[name], make_batch()
    single = {
        field.name: tensor.float() if tensor is not None and tensor.is_floating_point() else tensor
        for field in dataclasses.fields(batch)
        if field.name != "tokens"
        for tensor in [getattr(batch, field.name)]
    }
    output = objective.loss(with_tokens(dataclasses.replace(batch, **single)), make_config(objective))
    assert {output.loss_sum.dtype, output.num_prompts.dtype, *(p.dtype for p in output.metrics.values())} == {
        torch.float32
    }
    exact = objective.loss(batch, make_config(objective))
    torch.testing.assert_close(output.loss_sum.double(), exact.loss_sum, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_not_needed_may_be_missing(name: str) -> None:
    objective, batch = OBJECTIVES[name], make_batch(ranked=True)
    needs = objective.needs_of(make_config(objective))
    if not needs.reference:
        batch = dataclasses.replace(batch, reference_prompt_logps=None, reference_response_logps=None)
    if needs.values is None:
        batch = dataclasses.replace(batch, values=None)
    if not needs.kl_estimate:
        batch = dataclasses.replace(batch, kl_estimate=None)
    if not needs.rewards and not needs.attributes:
        batch = dataclasses.replace(batch, rewards=torch.full_like(batch.rewards, torch.nan))
    if needs.scores:
        scores = batch.scores.clone().requires_grad_()
        output = objective.loss(dataclasses.replace(batch, scores=scores), make_config(objective))
        (gradient,) = torch.autograd.grad(output.loss_sum, scores)
    else:
        batch = dataclasses.replace(batch, scores=None)
        output, _, gradient = loss_and_gradients(objective, batch, make_config(objective))
    assert output.loss_sum.isfinite() and output.num_prompts > 0
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_found_under_its_own_name_and_starts_from_defaults(name: str) -> None:
    assert get(name).name == name
    config = get(name).make_config({})
    assert config == get(name).config_type()
    resolved = get(name).resolve(config, RewardSummary(1.0, 0.0, 1.0, all_labels=True))
    decided_by_data = {"rm_regression": {"num_attributes": 1}, "rao": {"log_z0": 10.0}}
    assert resolved == dataclasses.replace(config, **decided_by_data.get(name, {}))
    assert type(config).__dataclass_params__.frozen


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"model\.objective=rao2.*did you mean rao\?"):
        get("rao2")


def test_two_objectives_of_one_name_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="duplicate"):
        table(get("rao"), get("rao"))


@pytest.mark.parametrize(
    ("name", "keys", "need", "expected"),
    [
        ("rpo", {}, "reference", True),
        ("rpo", {"use_reference": False}, "reference", False),
        ("rpo", {"explicit": "constant"}, "rewards", False),
        ("rpo", {"distance": "sqloo"}, "pairs", False),
        ("rpo", {"distance": "sq"}, "pairs", True),
        ("sppo", {}, "rewards", False),
        ("sppo", {"win_probability": "rewards"}, "rewards", True),
        ("kto", {}, "preference", True),
        ("kto", {"threshold": 1.0}, "rewards", True),
        ("simpo", {}, "reference", False),
    ],
)
def test_what_is_needed_follows_from_the_keys(name: str, keys: dict, need: str, expected: bool) -> None:
    objective = get(name)
    assert getattr(objective.needs_of(objective.make_config(keys)), need) is expected
