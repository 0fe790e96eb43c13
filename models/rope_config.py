"""Config of rotary positions: what the keys say, and what one layer's rotation is built from. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ..config.keys import Side, key
from ..config.problems import Problem

KINDS = ("none", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary angles for sequences longer than a model was first trained on."""

    SIDE: ClassVar[Side] = Side.RECIPE

    kind: str = key("none", "none, linear, llama3, yarn or longrope")
    factor: float = key(1.0, "how many times longer the context is than original_positions")
    original_positions: int | None = key(None, "context that the model was first trained on (llama3, yarn, longrope)")
    low_freq_factor: float = key(1.0, "llama3: wavelengths above original_positions over this are stretched by the factor")
    high_freq_factor: float = key(4.0, "llama3: wavelengths below original_positions over this stay as they are")
    beta_fast: float = key(32.0, "yarn: pairs that turn more often within original_positions stay as they are")
    beta_slow: float = key(1.0, "yarn: pairs that turn less often within original_positions are stretched by the factor")
    truncate: bool = key(True, "yarn: round the two borders to whole pairs")
    mscale: float | None = key(None, "yarn: with mscale_all_dim, the attention factor as in DeepSeek-V2")
    mscale_all_dim: float | None = key(None, "yarn: see mscale")
    attention_factor: float | None = key(None, "yarn, longrope: factor on queries and keys; null: the paper's, from factor")
    short_factor: list[float] | None = key(None, "longrope: factor of each pair for sequences up to original_positions")
    long_factor: list[float] | None = key(None, "longrope: factor of each pair for longer sequences")
    long: bool = key(True, "longrope: use long_factor, whatever a sequence's length; false: short_factor")
    sliding: bool = key(False, "whether layers with a window are scaled, too")

    def problems(self, key: str, width: int) -> Iterator[Problem]:
        """Yield what is wrong with the values. width: of what rotates in a head."""
        if self.kind not in KINDS:
            yield Problem(f"{key}.kind", f"there is no '{self.kind}'", f"use {', '.join(KINDS)}")
            return
        if self.kind == "none":
            return
        if not 1 <= self.factor < math.inf:
            yield Problem(f"{key}.factor", f"{self.factor} can't be", "use 1 or more")
        if self.kind in ("llama3", "yarn", "longrope") and (self.original_positions or 0) < 2:
            text = f"{self.kind} scaling starts from the length of the first training"
            yield Problem(f"{key}.original_positions", text, "give it, for example 8192")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            text = f"{self.low_freq_factor} is not below high_freq_factor={self.high_freq_factor}"
            yield Problem(f"{key}.low_freq_factor", text, "use 1 and 4, as Llama 3.1")
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            yield Problem(f"{key}.beta_slow", f"{self.beta_slow} is above beta_fast={self.beta_fast}", "use 1 and 32")
        if self.kind == "longrope":
            name = "long_factor" if self.long else "short_factor"
            factors = self.pair_factors
            if len(factors) != width // 2 or not all(0 < each < math.inf for each in factors):
                text = f"needs a positive number for each of the {width // 2} pairs, and has {len(factors)}"
                yield Problem(f"{key}.{name}", text, "give the list of the model's config.json")

    @property
    def pair_factors(self) -> list[float]:
        """Longrope's factors that are in use."""
        return list((self.long_factor if self.long else self.short_factor) or ())

    @property
    def angle_factor(self) -> float:
        """The factor on cosines and sines, and so on queries and keys alike."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            assert self.original_positions is not None
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_positions))
        if self.mscale and self.mscale_all_dim:
            return yarn_factor(self.factor, self.mscale) / yarn_factor(self.factor, self.mscale_all_dim)
        return yarn_factor(self.factor)


def yarn_factor(factor: float, mscale: float = 1.0) -> float:
    """Compute YaRN's factor on attention for contexts `factor` times as long (arXiv 2309.00071); mscale: DeepSeek's weight."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions of a layer.

    width        how much of a head's width rotates: an even number
    theta        base of the angles
    interleaved  whether pairs are (2i, 2i + 1) instead of (i, i + width / 2)
    """

    width: int
    theta: float
    interleaved: bool = False
    scaling: RopeScaling = field(default_factory=RopeScaling)
