"""The norms of a decoder."""

from __future__ import annotations

from torch import nn

from .init import Constant
from .part import Part, WeightRule
from .part_config import NormConfig


class Norm(nn.RMSNorm, Part):
    """RMSNorm. Its weight begins at one and does not decay."""

    def __init__(self, config: NormConfig) -> None:
        super().__init__(config.width, config.eps)

    def weight_rule(self, name: str) -> WeightRule:
        """Return the rule of the weight, the only parameter."""
        assert name == "weight", name
        return WeightRule(Constant(1.0), decays=False)
