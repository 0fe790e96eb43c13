"""Formats of differences that travel between islands: the masters' dtype, bf16, or int8 with a scale for each block.

Sums are always taken in the masters' dtype, after decoding, so a sum over islands rounds only what each of them sends, and its
own result. Rounding is to nearest.
"""

from __future__ import annotations

from typing import Protocol

import torch

BLOCK = 256
"""Elements that share a scale in int8."""


class Wire(Protocol):
    """A way to write numbers as bytes. The last dim of what is encoded must be a multiple of `block`."""

    block: int

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return (…, n) floating-point numbers as (…, bytes) uint8."""
        ...

    def decode(self, sent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers of such bytes, in this dtype."""
        ...


class AsDtype:
    """Numbers in a floating-point dtype; None: in their own."""

    block = 1

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `Wire`."""
        return (numbers if self._dtype is None else numbers.to(self._dtype)).contiguous().view(torch.uint8)

    def decode(self, sent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Wire`."""
        return sent.view(self._dtype or dtype).to(dtype)


class Int8Blocks:
    """Integers in [−127, 127] times the block's scale, which is its largest magnitude / 127 in fp32: 1.016 bytes an element."""

    block = BLOCK

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """See `Wire`: all integers of a row, then its scales."""
        blocks = numbers.unflatten(-1, (-1, BLOCK)).float()
        scales = blocks.abs().amax(-1) / 127
        whole = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().to(torch.int8)
        return torch.cat([whole.flatten(-2).view(torch.uint8), scales.contiguous().view(torch.uint8)], -1)

    def decode(self, sent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Wire`."""
        blocks = sent.shape[-1] // (BLOCK + 4)
        whole = sent[..., : blocks * BLOCK].contiguous().view(torch.int8).unflatten(-1, (blocks, BLOCK))
        scales = sent[..., blocks * BLOCK :].contiguous().view(torch.float32)
        return (whole.to(dtype) * scales.to(dtype).unsqueeze(-1)).flatten(-2)


def wire_of(dtype: str) -> Wire:
    """Return the way of `optim.local.dtype`."""
    return {"fp32": AsDtype(), "bf16": AsDtype(torch.bfloat16), "int8": Int8Blocks()}[dtype]
