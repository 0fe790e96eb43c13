"""The norms of a decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .init import Filled
from .part import Part, WeightRule
from .part_config import NormConfig


class Norm(nn.RMSNorm, Part):
    """RMSNorm, whose factor is its weight, or one plus its weight. The factor begins at one; the weight does not decay."""

    def __init__(self, config: NormConfig) -> None:
        super().__init__(config.width, config.eps)
        self.config = config

    def weight_rule(self, name: str) -> WeightRule:
        """Return the rule of the weight, the only parameter."""
        assert name == "weight", name
        return WeightRule(Filled(0.0 if self.config.plus_one else 1.0), decays=False)

    def factor(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what a normed input is multiplied by."""
        return 1 + weight if self.config.plus_one else weight

    def apply_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Normalise the last dim of x with this weight: the module's own, or the part of it that belongs to x."""
        return F.rms_norm(x, weight.shape, self.factor(weight), self.config.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dim."""
        return self.apply_weight(x, self.weight)
