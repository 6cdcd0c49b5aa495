"""Rounding through 8 bits against a table of all such numbers, and scales against those worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_rao.ops.float8 import E4M3, E5M2, block_amax, e8m0_scale_of, rounded, scale_of, spread

from .float8_table import nearest, numbers, through

ONE = torch.ones(())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_number_of_the_format_stays_as_it_is(dtype: torch.dtype) -> None:
    table = numbers(dtype).float()
    assert torch.equal(rounded(torch.cat([table, -table]), ONE, dtype), torch.cat([table, -table]))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_others_become_the_nearest_and_ties_the_even_one(dtype: torch.dtype) -> None:
    table = numbers(dtype).float()
    between = (table[1:] + table[:-1]) / 2
    random = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 3
    for values in (between, between * 1.001, between * 0.999, -between, random):
        assert torch.equal(rounded(values, ONE, dtype).double(), nearest(values, dtype))


@pytest.mark.parametrize(("dtype", "limit"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_numbers_beyond_the_range_become_its_largest(dtype: torch.dtype, limit: float) -> None:
    values = torch.tensor([limit, limit * 1.01, 1e30, -1e30])
    assert rounded(values, ONE, dtype).tolist() == [limit, limit, limit, -limit]


@pytest.mark.parametrize(
    ("amax", "plain", "power_of_2", "e8m0"),
    [
        (448.0, 1.0, 1.0, 1.0),
        (1.0, 448.0, 256.0, 256.0),  # 1/448 lies between 2^-9 and 2^-8: up
        (1.75, 256.0, 256.0, 256.0),  # 1.75 * 2^8 = 448: nothing to round
        (449.0, 448 / 449, 0.5, 0.5),
        (0.02, 22400.0, 16384.0, 16384.0),
        (3.0, 448 / 3, 128.0, 128.0),
        (0.0, 1.0, 1.0, 1.0),
        (math.inf, 1.0, 1.0, 1.0),
        (math.nan, 1.0, 1.0, 1.0),
    ],
)
def test_scales_of_e4m3_are_those_worked_out_by_hand(amax: float, plain: float, power_of_2: float, e8m0: float) -> None:
    given = torch.tensor(amax)
    assert scale_of(given, E4M3).item() == pytest.approx(plain, rel=1e-6)
    assert scale_of(given, E4M3, power_of_2=True).item() == power_of_2
    assert e8m0_scale_of(given, E4M3).item() == e8m0


@pytest.mark.parametrize("amax", [1e-38, 1e-30, 1e-20, 1e30, 3e38])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales_of_extreme_values_are_finite_and_keep_them_in_range(amax: float, dtype: torch.dtype) -> None:
    given = torch.tensor(amax)
    for scale in (scale_of(given, dtype), scale_of(given, dtype, power_of_2=True), e8m0_scale_of(given, dtype)):
        assert scale.isfinite() and scale > 0
        assert given * scale <= torch.finfo(dtype).max * (1 + 1e-6)


def test_blocks_at_the_edges_are_smaller() -> None:
    values = torch.arange(1.0, 16.0).view(3, 5) * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    assert block_amax(values, (2, 2)).tolist() == [[7, 9, 10], [12, 14, 15]]
    assert block_amax(values, (1, 4)).tolist() == [[4, 5], [9, 10], [14, 15]]
    assert spread(block_amax(values, (2, 2)), (2, 2), values.shape).tolist() == [
        [7, 7, 9, 9, 10],
        [7, 7, 9, 9, 10],
        [12, 12, 14, 14, 15],
    ]


def test_scaling_uses_the_range_that_a_cast_alone_wastes() -> None:
    """Weights of 0.02: most lie among e4m3's subnormal numbers, and lose digits that a scale keeps."""
    weights = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.02
    scale = scale_of(weights.abs().max(), E4M3)
    assert torch.allclose(rounded(weights, scale, E4M3).double(), through(weights, E4M3, scale), rtol=1e-6, atol=0)
    error = [(rounded(weights, s, E4M3) - weights).norm() / weights.norm() for s in (ONE, scale)]
    assert error[1] < 0.03 < error[0]
