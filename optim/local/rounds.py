"""Steps at which islands exchange weights, and which weights: a function of the step alone, so that a resume keeps the rhythm.

A fragment is a group of layers. Each sends its differences once in `inner_steps`, and fragments take turns at equal distances;
the last one's turn is at multiples of `inner_steps`. Layers are dealt to fragments in strides, as in Streaming DiLoCo (arXiv
2501.18512): neighbouring layers travel at different times. Weights outside the layers go with the last fragment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .config import LocalConfig


@dataclass(frozen=True)
class Rounds:
    """The rhythm of a config."""

    config: LocalConfig

    def sends(self, fragment: int, step: int) -> bool:
        """Return whether a fragment sends its differences after this step (counted from 1)."""
        every, fragments = self.config.inner_steps, self.config.fragments
        return (step - (fragment + 1) * every // fragments) % every == 0

    def fragment_of(self, layer: int | None) -> int:
        """Return the fragment of a layer's weights; None: of weights outside the layers."""
        fragments = self.config.fragments
        return fragments - 1 if layer is None else layer % fragments

    def split(self, layers: Mapping[str, int | None]) -> Sequence[Sequence[str]]:
        """Divide weights into fragments. layers: the layer of each weight, by name."""
        found: list[list[str]] = [[] for _ in range(self.config.fragments)]
        for name, layer in layers.items():
            found[self.fragment_of(layer)].append(name)
        return found
