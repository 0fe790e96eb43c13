"""The encodings of tensors in the files: their values, or codes with scales from which values are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ....parallel.box import Box
from ...manifest import StoredArray
from .quantised import MX_BLOCK, BlockScaled, Microscaled

SCALES = "_scale_inv"
"""Suffix of the name of fp8 blocks' scales, behind the name of their codes."""

MX_CODES, MX_SCALES = "_blocks", "_scales"
"""Suffixes of the names of MXFP4's codes and scales, behind the name of their tensor."""


class Tensor(Protocol):
    """A tensor as it is read. dtype: of its values, as in safetensors"""

    @property
    def dtype(self) -> str:
        """Type of the values, as in safetensors."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        ...

    def sources(self, region: Box) -> Sequence[tuple[StoredArray, Box]]:
        """Return what must be read for a region of the values; the largest first."""
        ...

    def decode(self, read: Sequence[torch.Tensor], region: Box) -> torch.Tensor:
        """Return the values of a region. read: what was read of its sources"""
        ...


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is stored as its values."""

    stored: StoredArray

    @property
    def dtype(self) -> str:
        """See Tensor."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See Tensor."""
        return self.stored.shape

    def sources(self, region: Box) -> Sequence[tuple[StoredArray, Box]]:
        """See Tensor."""
        return [(self.stored, region)]

    def decode(self, read: Sequence[torch.Tensor], region: Box) -> torch.Tensor:
        """See Tensor."""
        return read[0]


def decodable(stored: Mapping[str, StoredArray], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that the stored ones stand for: those that are stored as values, and those that can be decoded.

    stored: name → tensor of the files; config: the folder's config.json, which may describe a quantisation
    """
    found: dict[str, Tensor] = {name: PlainTensor(each) for name, each in stored.items()}
    how: Mapping[str, Any] = config.get("quantization_config") or {}
    if how.get("quant_method") == "mxfp4":
        for name, codes in stored.items():
            whole = name.removesuffix(MX_CODES)
            scales = stored.get(whole + MX_SCALES)
            if name == whole or scales is None or len(scales.shape) != 3 or not codes.dtype == scales.dtype == "U8":
                continue
            if codes.shape == (*scales.shape, MX_BLOCK // 2):
                found[whole] = Microscaled(codes, scales)
                del found[name], found[scales.name]
    block = how.get("weight_block_size") if how.get("quant_method") == "fp8" else None
    for name, scales in stored.items():
        codes = stored.get(name.removesuffix(SCALES))
        if block and name.endswith(SCALES) and codes is not None and (codes.dtype, scales.dtype) == ("F8_E4M3", "F32"):
            expected = tuple(-(-extent // size) for extent, size in zip(codes.shape, block, strict=False))
            if len(codes.shape) == 2 and scales.shape == expected:
                found[codes.name] = BlockScaled(codes, scales, tuple(block))
                del found[name]
    return found
