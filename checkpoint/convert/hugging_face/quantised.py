"""Tensors that are stored as codes of fewer bits with a scale for each block, and read as bf16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ....parallel.box import Box
from ...manifest import StoredArray


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
