"""Rounding to bf16 by chance, or in two numbers: beside the numbers' own spacing, and on any cut of an array."""

from __future__ import annotations

import pytest
import torch

from meshloom.kernels.random_bits import BoxIndex, indexed_rows
from meshloom.kernels.rounding import round_stochastic, split_in_two


def rounded(values: torch.Tensor, key: int = 1) -> torch.Tensor:
    out = torch.empty_like(values, dtype=torch.bfloat16)
    round_stochastic(values, out, key=key, global_shape=tuple(values.shape), offsets=(0,) * values.dim())
    return out


def test_the_mean_is_exact_and_neighbours_are_the_nearest_two() -> None:
    """Between 1 and 2 bf16 numbers lie 1/128 apart."""
    for share in (0.0, 0.1, 0.5, 0.93):
        value = 1 + (3 + share) / 128
        found = rounded(torch.full((400, 500), value)).double()
        assert set(found.unique().tolist()) <= {1 + 3 / 128, 1 + 4 / 128}
        spread = (share * (1 - share) / found.numel()) ** 0.5 / 128
        assert abs(float(found.mean()) - value) <= 4 * spread + 1e-7
        assert torch.equal(rounded(torch.full((40, 50), -value)).double(), -rounded(torch.full((40, 50), value)).double())


def test_values_that_bf16_has_stay_as_they_are() -> None:
    values = torch.tensor([0.0, -1.5, torch.inf, -torch.inf, 2.0**-130, 2.0**127])
    assert torch.equal(rounded(values), values.bfloat16())
    assert bool(rounded(torch.tensor([torch.nan])).isnan().all())
    assert rounded(torch.tensor(1.25)).shape == ()


def test_rounding_depends_on_the_key_and_the_place_in_the_whole() -> None:
    values = torch.randn(13, 10, generator=torch.Generator().manual_seed(0))
    whole = rounded(values)
    assert torch.equal(whole, rounded(values)) and not torch.equal(whole, rounded(values, key=2))
    for rows, columns in ((slice(4, 9), slice(0, 10)), (slice(0, 13), slice(3, 7)), (slice(2, 2), slice(0, 10))):
        part = torch.empty_like(values[rows, columns], dtype=torch.bfloat16)
        begin = rows.start, columns.start
        round_stochastic(values[rows, columns], part, key=1, global_shape=(13, 10), offsets=begin)
        assert torch.equal(part, whole[rows, columns])


def test_two_numbers_hold_sixteen_bits() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    high, low = (torch.empty(1000, dtype=torch.bfloat16) for _ in range(2))
    split_in_two(values, high, low)
    assert torch.equal(high, values.bfloat16())
    assert float(((high.double() + low.double() - values) / values).abs().max()) <= 2.0**-17


BOXES = [
    ((13, 10), (13, 10), (0, 0)),
    ((4, 10), (13, 10), (3, 0)),
    ((4, 7), (13, 10), (3, 2)),
    ((4, 1), (13, 10), (3, 9)),
    ((1, 7), (13, 10), (3, 2)),
    ((3, 4, 5), (6, 4, 5), (3, 0, 0)),
    ((3, 2, 5), (6, 4, 5), (3, 2, 0)),
    ((3, 4, 2), (6, 4, 5), (3, 0, 3)),
    ((1, 2, 2), (6, 4, 5), (3, 2, 3)),
    ((7,), (9,), (2,)),
    ((), (), ()),
]


@pytest.mark.parametrize(("shape", "whole", "offsets"), BOXES)
def test_three_numbers_say_where_a_box_lies(shape: tuple[int, ...], whole: tuple[int, ...], offsets: tuple[int, ...]) -> None:
    box = BoxIndex.of(shape, whole, offsets)
    assert box is not None
    ((_, expected),) = indexed_rows(shape, whole, offsets, torch.device("cpu"))
    at = torch.arange(expected.numel())
    assert torch.equal(box.first + at // box.length * box.stride + at % box.length, expected.flatten())


def test_a_box_of_uneven_rows_has_no_three_numbers() -> None:
    assert BoxIndex.of((3, 2, 3), (6, 4, 5), (0, 0, 0)) is None
