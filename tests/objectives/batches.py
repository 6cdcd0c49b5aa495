"""Batches for tests of objectives, and a plain-Python view of them that shares no code with the package."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch, RewardSummary, Tokens

# Of data that any objective takes, about as in `make_batch`.
REWARDS = RewardSummary(mean=3.0, low=0.0, high=1.0, all_labels=True, all_ranked=True)

GRADIENT_FIELDS = ("prompt_logps", "response_logps")
GLOBAL_FIELDS = ("kl_estimate",)  # of the global batch, no prompt's own


def make_batch(seed: int = 0, num_responses: tuple[int, ...] = (2, 3, 1, 4), ranked: bool = False) -> ObjectiveBatch:
    """A float64 batch of prompts with the given numbers of responses, in the first places; distinct rewards."""
    generator = torch.Generator().manual_seed(seed)
    num_prompts, widest = len(num_responses), max(num_responses, default=0)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(num_prompts, widest, generator=generator, dtype=torch.float64) * (high - low) + low

    valid = torch.arange(widest) < torch.tensor(num_responses)[:, None]
    prompts = uniform(-60, -20)[:, :1].expand(-1, widest) + uniform(-1e-6, 1e-6)  # a prompt's rows: equal, but rounding
    batch = ObjectiveBatch(
        prompt_logps=prompts,
        response_logps=uniform(-90, -30),
        reference_prompt_logps=prompts + uniform(-3, 3)[:, :1],
        reference_response_logps=uniform(-90, -30),
        rewards=uniform(-2, 8),
        lengths=uniform(5, 40).round(),
        prompt_lengths=uniform(3, 30).round()[:, :1].expand(-1, widest),
        valid=valid,
        ranked=torch.full((num_prompts,), ranked),
        values=uniform(-1, 3)[:, :1].expand(-1, widest),
        scores=uniform(-2, 2)[:, :, None],
        kl_estimate=uniform(0, 4)[0, 0] if num_prompts else torch.tensor(1.0, dtype=torch.float64),
    )
    return masked(batch, 0.0)


def with_tokens(batch: ObjectiveBatch) -> ObjectiveBatch:
    """The batch with three tokens in each response: a part of its log-probability, through which gradients reach it,
    and of its value."""
    shares = batch.response_logps.new_tensor([0.05, 0.03, 0.02])
    mask = batch.valid[..., None].expand(-1, -1, 3)
    # Differently for each response, as the advantages of a prompt's add up to 0.
    moved = batch.lengths[..., None] / 20 * batch.response_logps.new_tensor([4.0, -2.0, 1.0])
    reference = batch.reference_response_logps
    values = None if batch.values is None else batch.values[..., None] * shares
    tokens = Tokens(
        logps=batch.response_logps[..., None] * shares,
        old=(batch.response_logps.detach()[..., None] + moved) * shares,
        reference=None if reference is None else reference[..., None] * shares,
        mask=mask,
        values=values,
        old_values=None if values is None else values.detach() + moved / 10,
        advantages=-moved,  # towards which the ratio has moved, so that it is clipped
        returns=moved.square(),
    )
    return dataclasses.replace(batch, tokens=tokens)


def make_config(objective, keys=None):  # type: ignore[no-untyped-def]
    """The objective's config with some keys set, and those resolved that the data decides."""
    return objective.resolve(objective.make_config(keys or {}), REWARDS)


def masked(batch: ObjectiveBatch, value: float) -> ObjectiveBatch:
    """The batch with ``value`` in all invalid entries."""

    def fill(tensor: Tensor) -> Tensor:
        return tensor.masked_fill(~batch.valid.view(*batch.valid.shape, *[1] * (tensor.dim() - 2)), value)

    return each_tensor(batch, fill)


def each_tensor(batch: ObjectiveBatch, change: Callable[[Tensor], Tensor]) -> ObjectiveBatch:
    """The batch with its floating-point tensors ``[P, K]`` changed."""
    changed = {
        field.name: change(tensor)
        for field in dataclasses.fields(batch)
        if isinstance(tensor := getattr(batch, field.name), Tensor)
        and tensor.is_floating_point()
        and field.name not in GLOBAL_FIELDS
    }
    return with_tokens(dataclasses.replace(batch, **changed))


def select(batch: ObjectiveBatch, prompts: Tensor) -> ObjectiveBatch:
    """Some of the batch's prompts, in the order given."""
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    selected = {
        name: tensor if tensor is None or name in GLOBAL_FIELDS else tensor[prompts]
        for name, tensor in tensors.items()
        if name != "tokens"
    }
    return with_tokens(ObjectiveBatch(**selected))


def permute_responses(batch: ObjectiveBatch, order: Tensor) -> ObjectiveBatch:
    """Every prompt's responses in another order ``[K]``; valid ones may come to stand behind invalid ones."""
    moved = each_tensor(batch, lambda tensor: tensor[:, order])
    return with_tokens(dataclasses.replace(moved, valid=batch.valid[:, order]))


def with_gradients(batch: ObjectiveBatch) -> ObjectiveBatch:
    """The batch with fresh leaves for policy log-probabilities."""
    leaves = {
        name: tensor.detach().clone().requires_grad_()
        for name in (*GRADIENT_FIELDS, "scores")  # the losses of reward models depend on nothing else
        if (tensor := getattr(batch, name)) is not None
    }
    return with_tokens(dataclasses.replace(batch, **leaves))


def loss_and_gradients(objective, batch, config):  # type: ignore[no-untyped-def]
    """``(LossOutput, d loss_sum / d prompt_logps, d loss_sum / d response_logps)``; zeros where there is no path."""
    batch = with_gradients(batch)
    output = objective.loss(batch, config)
    gradients = torch.autograd.grad(
        output.loss_sum, [getattr(batch, name) for name in GRADIENT_FIELDS], allow_unused=True, materialize_grads=True
    )
    return output, *gradients


@dataclass(frozen=True)
class Entry:
    """One response in plain numbers. ``row`` and ``column`` are its place ``[P, K]``; ``count`` its prompt's K."""

    row: int
    column: int
    count: int
    rho_x: float
    rho: float
    logp: float
    length: float
    reward: float


def prompts_of(batch: ObjectiveBatch) -> Iterator[list[Entry]]:
    """The valid responses of each prompt."""
    for row in range(batch.valid.shape[0]):
        columns = [column for column in range(batch.valid.shape[1]) if batch.valid[row, column]]
        yield [
            Entry(
                row,
                column,
                len(columns),
                rho_x=float(batch.prompt_logps[row, column]) - float(batch.reference_prompt_logps[row, column]),
                rho=float(batch.response_logps[row, column]) - float(batch.reference_response_logps[row, column]),
                logp=float(batch.response_logps[row, column]),
                length=float(batch.lengths[row, column]),
                reward=float(batch.rewards[row, column]),
            )
            for column in columns
        ]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
