"""Masks for attention: those of all sizes are parts of one tensor, and nothing else is kept for the backward pass."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from nemo_rao.mcore import causal_masks
from nemo_rao.mcore.causal_masks import causal_mask

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def none_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_masks, "_shared", {})


def seen(num_queries: int, num_keys: int, window: int | None) -> torch.Tensor:
    """By the definition: query i is the token ``m - n + i``, and sees itself and what is before it."""
    token = torch.arange(num_keys - num_queries, num_keys)[:, None]
    distance = token - torch.arange(num_keys)
    return (distance >= 0) & (distance <= (num_keys if window is None else window))


SIZES = [(3, 3), (5, 40), (1, 1), (17, 100), (100, 100), (40, 41), (2, 99), (16, 16), (1, 160), (33, 64)]


@pytest.mark.parametrize("window", [None, 0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_size_is_right_whatever_was_asked_for_before(window: int | None, dtype: torch.dtype) -> None:
    for num_queries, num_keys in [*SIZES, *reversed(SIZES)]:
        mask = causal_mask(num_queries, num_keys, dtype=dtype, device=CPU, window=window)
        expected = torch.where(seen(num_queries, num_keys, window), 0.0, -torch.inf)
        assert mask.dtype == dtype and mask.float().equal(expected), (num_queries, num_keys)
        assert mask.data_ptr() % 32 == 0 and mask.stride(0) % 16 == 0


def test_masks_of_smaller_sizes_are_parts_of_one() -> None:
    largest = causal_mask(40, 120, dtype=torch.float32, device=CPU)
    held = largest.untyped_storage().data_ptr()
    for num_queries, num_keys in itertools.product((1, 7, 39), (39, 40, 118, 120)):
        part = causal_mask(num_queries, num_keys, dtype=torch.float32, device=CPU)
        assert part.untyped_storage().data_ptr() == held


def test_attention_keeps_no_mask_of_its_own_for_the_backward_pass() -> None:
    """A boolean mask would be kept as a new tensor of the queries' type, by each call."""
    query, keys = torch.randn(1, 2, 24, 8, requires_grad=True), torch.randn(1, 2, 90, 8, requires_grad=True)
    mask = causal_mask(24, 90, dtype=torch.float32, device=CPU)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attended = F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask)
    of_mask = [one for one in kept if one.shape[-2:] == (24, 90)]
    assert of_mask and all(one.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr() for one in of_mask)
    attended.sum().backward()
    by_definition = F.scaled_dot_product_attention(query, keys, keys, attn_mask=seen(24, 90, None))
    torch.testing.assert_close(attended, by_definition)
