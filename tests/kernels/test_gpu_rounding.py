"""Rounding to bf16 in one pass on a GPU: the bits that PyTorch's operations give on a CPU, for any box of an array."""

from __future__ import annotations

import pytest
import torch

from meshloom.kernels.rounding import round_stochastic, split_in_two

pytestmark = pytest.mark.gpu

BOXES = [
    ((300, 40), (300, 40), (0, 0)),
    ((5, 40), (37, 40), (9, 0)),
    ((37, 7), (37, 40), (0, 11)),
    ((37, 1), (37, 40), (0, 39)),
    ((1500,), (9000,), (4001,)),
    ((3, 2, 5), (6, 4, 5), (3, 2, 0)),
    ((2, 2, 2), (6, 4, 5), (3, 2, 1)),  # its rows are not evenly apart
    ((40, 30), (1 << 20, 1 << 16), ((1 << 20) - 40, 0)),  # indices beyond 32 bits
    ((), (), ()),
]


def values(shape: tuple[int, ...]) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    if drawn.numel() > 9:
        drawn.view(-1)[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -1e-45, 0.0])
    return drawn


@pytest.mark.parametrize(("shape", "whole", "offsets"), BOXES)
def test_rounding_by_chance_has_the_bits_of_the_cpu(
    shape: tuple[int, ...], whole: tuple[int, ...], offsets: tuple[int, ...]
) -> None:
    exact = values(shape)
    for key in (1, 2**63 + 12345, 2**64 - 1, 3 << 40):
        expected, found = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        round_stochastic(exact, expected, key=key, global_shape=whole, offsets=offsets)
        round_stochastic(exact.cuda(), found, key=key, global_shape=whole, offsets=offsets)
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_two_numbers_have_the_bits_of_the_cpu() -> None:
    exact = values((300, 41))[1:]
    expected, found = ([torch.zeros(exact.shape, dtype=torch.bfloat16, device=on) for _ in range(2)] for on in ("cpu", "cuda"))
    split_in_two(exact, *expected)
    split_in_two(exact.cuda(), *found)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)
