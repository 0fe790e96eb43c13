"""Precisions that a run computes in: `precision` of the config. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """One value of `precision`.

    dtype        name of PyTorch's dtype that the model computes in
    bytes        of an element that is computed with
    accum_bytes  of an element that is updated or summed: masters, optimizer state, gradient sums
    """

    dtype: str
    bytes: int
    accum_bytes: int


PRECISIONS = {
    "fp32": Precision("float32", 4, 4),
    "bf16": Precision("bfloat16", 2, 4),
    "fp64": Precision("float64", 8, 8),
}
