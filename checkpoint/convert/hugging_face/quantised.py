"""Tensors that are stored as codes of fewer bits with a scale for each block, and read as bf16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ....parallel.box import Box
from ...manifest import StoredArray

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0 to 7 of E2M1; the fourth bit is the sign (OCP Microscaling Formats, version 1.0)."""

MX_BLOCK = 32  # values that share a scale
E8M0_BIAS = 127


@dataclass(frozen=True)
class BlockScaled:
    """A matrix of fp8 codes with a scale for each block of rows and columns (DeepSeek-V3, arXiv 2412.19437, 3.3).

    codes   (R, C); scales: (⌈R / block rows⌉, ⌈C / block columns⌉); block: rows and columns
    """

    codes: StoredArray
    scales: StoredArray
    block: tuple[int, int]
    dtype: str = "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        """See Tensor."""
        return self.codes.shape

    def sources(self, region: Box) -> Sequence[tuple[StoredArray, Box]]:
        """See Tensor."""
        first = tuple(at // size for at, size in zip(region.offsets, self.block, strict=True))
        last = tuple((at - 1) // size for at, size in zip(region.ends, self.block, strict=True))
        return [(self.codes, region), (self.scales, Box(first, tuple(b - a + 1 for a, b in zip(first, last, strict=True))))]

    def decode(self, read: Sequence[torch.Tensor], region: Box) -> torch.Tensor:
        """See Tensor."""
        codes, scales = read[0].float(), read[1].float()
        for dim, size in enumerate(self.block):
            begin = region.offsets[dim] // size * size
            index = (torch.arange(region.offsets[dim], region.ends[dim]) - begin) // size
            scales = scales.index_select(dim, index)
        return (codes * scales).to(torch.bfloat16)


@dataclass(frozen=True)
class Microscaled:
    """Matrices of MXFP4, two codes in a byte and a power of two for each 32 of them, whose values lie the other way round.

    codes  (E, R, C / 32, 16); scales: (E, R, C / 32), exponents with a bias; values: (E, C, R), as in gpt-oss
    """

    codes: StoredArray
    scales: StoredArray
    dtype: str = "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        """See Tensor."""
        experts, rows, blocks, _ = self.codes.shape
        return experts, blocks * MX_BLOCK, rows

    def sources(self, region: Box) -> Sequence[tuple[StoredArray, Box]]:
        """See Tensor."""
        (expert, column, row), (experts, columns, rows) = region.offsets, region.shape
        first, last = column // MX_BLOCK, (column + columns - 1) // MX_BLOCK
        scales = Box((expert, row, first), (experts, rows, last - first + 1))
        return [(self.codes, Box((*scales.offsets, 0), (*scales.shape, MX_BLOCK // 2))), (self.scales, scales)]

    def decode(self, read: Sequence[torch.Tensor], region: Box) -> torch.Tensor:
        """See Tensor."""
        values = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)))
        codes = torch.stack((read[0] & 15, read[0] >> 4), dim=-1).flatten(-2)  # the lower half of a byte comes first
        exponents = (read[1].int() - E8M0_BIAS)[..., None]
        decoded_ERC = torch.ldexp(values[codes.int()], exponents).flatten(-2).to(torch.bfloat16)
        column = region.offsets[1] % MX_BLOCK
        return decoded_ERC[..., column : column + region.shape[1]].transpose(1, 2)
