"""Validation data in parts: the sources of a mixture are evaluated apart, and their losses weighted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .samples.blend import apportion
from .samples.order import StoredSamples

if TYPE_CHECKING:
    from .node import DataNode


@dataclass(frozen=True)
class ValidationPart:
    """Validation samples of one source or set: its name ("" where there is but one), its weight in the loss, its samples.

    A weight of 0 is that of a named set, or of a source that is not trained on now.
    """

    name: str
    weight: float
    samples: StoredSamples


@dataclass(frozen=True)
class WeightedParts:
    """The validation samples of several sources."""

    parts: Sequence[ValidationPart]


def validation_parts(node: DataNode) -> list[ValidationPart]:
    """Return the parts of a node's validation data; none where nothing is held out."""
    held = node.validation()
    if held is None:
        return []
    return list(held.parts) if isinstance(held, WeightedParts) else [ValidationPart("", 1.0, held)]


def samples_of_parts(parts: Sequence[ValidationPart], samples: int) -> list[int]:
    """Divide an evaluation's samples among parts by weight: at least one of each, and at most all that it has.

    A part without weight has as many as all others together.
    """
    weights = [part.weight for part in parts]
    shares = apportion(weights, samples) if any(weights) else [0] * len(parts)
    asked = [max(1, share) if part.weight else samples for part, share in zip(parts, shares, strict=True)]
    return [min(count, len(part.samples)) for part, count in zip(parts, asked, strict=True)]
