"""The cost of a document to a rank, and the least time that a step of given documents can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """Seconds, or any other unit: quadratic · n² + linear · n for a document of n tokens, and `row` for each micro-batch."""

    quadratic: float
    linear: float
    row: float = 0.0

    def document(self, length: int) -> float:
        """Return the cost of a document on one rank; n ranks that share it take an n-th each."""
        return (self.quadratic * length + self.linear) * length


def least_time(lengths: Sequence[int], ranks: int, capacity: int, costs: CostModel) -> float:
    """Return a lower bound on the time of the slowest rank: all costs, those of the least number of rows too, shared evenly.

    capacity: tokens of a row at most. No assignment of any kind is faster, whatever it cuts.
    """
    rows = -(-sum(lengths) // capacity)
    return (sum(map(costs.document, lengths)) + rows * costs.row) / ranks
