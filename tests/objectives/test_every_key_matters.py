"""Every key of every objective changes its loss or a gradient on one fixed batch: a key that nothing reads fails."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nemo_rao.batch import ObjectiveBatch
from nemo_rao.keys import KeySpec, key
from nemo_rao.objectives.base import Objective
from nemo_rao.objectives.dpo import DPO, DPOConfig
from nemo_rao.objectives.registry import OBJECTIVES

from .batches import make_config, with_tokens
from .test_formulas import full_batch

# (objective, key) -> other keys under which it acts.
CONTEXT: dict[tuple[str, str], dict[str, Any]] = {
    ("dpo", "robust"): {"label_smoothing": 0.2},
    ("rpo", "gap"): {"explicit": "constant"},
    ("grpo", "kl_in"): {"beta": 0.3},
    ("grpo", "kl"): {"beta": 0.3},
    ("grpo", "constant_length"): {"normalize": "constant"},
}
# Values that cannot be derived from the key's default and range.
OTHER_VALUE: dict[tuple[str, str], Any] = {
    ("kto", "threshold"): 3.0,
    ("grpo", "clip_low"): 0.01,
    ("grpo", "clip_high"): 0.01,
    ("ppo", "clip"): 0.01,
    ("nca", "alpha"): 3.0,
    ("rao", "log_z0"): 7.0,
}
# Keys that act outside the loss, with the test that holds them.
OUTSIDE = {
    ("dro", "value_lr"): "the value head's optimizer group: tests/train/test_splits_with_heads.py",
    ("ppo", "value_lr"): "likewise",
    ("ppo", "critic"): "whom the value loss trains: tests/mcore/test_token_values.py",
    ("ppo", "critic_path"): "what the critic starts from: tests/train/test_online_critic.py",
    **{("ppo", name): "the advantages: test_ppo.py" for name in ("kl_coef", "gamma", "gae_lambda")},
    ("rm_regression", "num_attributes"): "the width of the score head, below",
}
ALL_KEYS = [(name, field.name) for name, each in OBJECTIVES.items() for field in dataclasses.fields(each.config_type)]
MASKED = -100.0  # RegressionConfig's mask_value


def fixed_batch() -> ObjectiveBatch:
    """Whatever any objective reads: three reward models, of which one has a masked label, reference rewards, values,
    scores of three attributes, KTO's log-ratio."""
    batch = full_batch("rewarded")
    assert batch.reward_ensemble is not None and batch.scores is not None
    labels = batch.reward_ensemble.clone()
    labels[1, 1, 2] = MASKED
    scores = torch.cat([batch.scores, batch.scores.square(), batch.scores - 1], -1)
    return dataclasses.replace(batch, reward_ensemble=labels, scores=scores)


def other_values(value: Any, spec: KeySpec) -> list[Any]:
    """Values that the key allows and that are not this one: all, where they can be listed."""
    if spec.choices is not None:
        return [choice for choice in spec.choices if choice != value]
    if isinstance(value, bool):
        return [not value]
    assert isinstance(value, float), f"a row of OTHER_VALUE is missing for {value!r}"
    more = value * 1.5 or 0.2
    return [more if spec.high is None or more < spec.high else value / 2]


def loss_and_all_gradients(objective: Objective, keys: dict[str, Any]) -> list[torch.Tensor]:
    """The loss, and its gradients with respect to log-probabilities, values and scores."""
    batch = fixed_batch()
    leaves = {
        name: getattr(batch, name).clone().requires_grad_()
        for name in ("prompt_logps", "response_logps", "values", "scores")
    }
    loss = objective.loss(with_tokens(dataclasses.replace(batch, **leaves)), make_config(objective, keys)).loss_sum
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients]


def matters(objective: Objective, name: str) -> bool:
    """Whether each other value of a key changes any of these numbers."""
    field = next(field for field in dataclasses.fields(objective.config_type) if field.name == name)
    whole_name = (objective.name, name)
    context = CONTEXT.get(whole_name, {})
    values = (
        [OTHER_VALUE[whole_name]] if whole_name in OTHER_VALUE else other_values(field.default, field.metadata["key"])
    )
    before = loss_and_all_gradients(objective, context)
    assert any(part.any() for part in before[1:]), "or nothing is compared"

    def differs(value: Any) -> bool:
        after = loss_and_all_gradients(objective, {**context, name: value})
        return any(not torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(before, after, strict=True))

    return all(map(differs, values))


@pytest.mark.parametrize(("objective", "name"), [one for one in ALL_KEYS if one not in OUTSIDE])
def test_every_key_changes_loss_or_gradient(objective: str, name: str) -> None:
    assert matters(OBJECTIVES[objective], name)


def test_the_tables_name_keys_that_there_are() -> None:
    assert {*CONTEXT, *OTHER_VALUE, *OUTSIDE} <= set(ALL_KEYS)


def test_num_attributes_is_the_width_of_the_score_head() -> None:
    objective = OBJECTIVES["rm_regression"]
    widths = [objective.needs_of(objective.make_config({"num_attributes": number})).scores for number in (1, 5)]
    assert widths == [1, 5]


def test_a_key_that_nothing_reads_is_found() -> None:
    @dataclass(frozen=True)
    class WithUnreadKey(DPOConfig):
        temperature: float = key(1.0, "of nothing", low=0)

    objective = dataclasses.replace(DPO, config_type=WithUnreadKey)
    assert matters(objective, "beta") and not matters(objective, "temperature")
