"""A part of a decoder: a module that knows how its own weights begin, decay, learn and are cut over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .init import Filled, Initial, Normal
from .part_config import MatrixScales
from .protocol import TensorRole


@dataclass(frozen=True)
class WeightRule:
    """The initial distribution of a parameter, whether weight decay applies to it, and the factor on its learning rate.

    stacked    number of matrices of equal shape that it holds, one below the other
    row_parts  rows of each part that a matrix joins, one below the other: of each head, or each fused projection
    """

    initial: Initial
    decays: bool = True
    lr_scale: float = 1.0
    stacked: int = 1
    row_parts: tuple[int, ...] = ()


BIAS = WeightRule(Filled(0.0), decays=False)


def reads_stream(scales: MatrixScales) -> WeightRule:
    """Return the rule of a matrix that reads the residual stream."""
    return WeightRule(Normal(scales.std), lr_scale=scales.lr_scale)


def writes_stream(scales: MatrixScales) -> WeightRule:
    """Return the rule of a matrix that writes to the residual stream."""
    return WeightRule(Normal(scales.out_std), lr_scale=scales.lr_scale)


class Part(nn.Module):
    """Base class of the parts.

    tensor_roles   roles of the part's children under tensor parallelism
    weight_rules   rule of the matrix of each child that is no part itself; biases have one in common
    """

    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {}
    weight_rules: Mapping[str, WeightRule] = {}

    def weight_rule(self, name: str) -> WeightRule:
        """Return the rule of a parameter, by its name within this part."""
        child, _, rest = name.partition(".")
        module = getattr(self, child)
        if isinstance(module, Part):
            return module.weight_rule(rest)
        return BIAS if rest == "bias" else self.weight_rules[child]
