"""The cost of a document to a rank, and the least time that a step of given documents can take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

ATTENTION_SPEED = 0.8  # FLOPs per second of attention over those of matrix products, on an H200 in bf16
ROW_TOKENS = 512


@dataclass(frozen=True)
class CostModel:
    """Seconds, or any other unit: quadratic · n² + linear · n for a document of n tokens, and `row` for each micro-batch."""

    quadratic: float
    linear: float
    row: float = 0.0

    def document(self, length: int) -> float:
        """Return the cost of a document on one rank; n ranks that share it take an n-th each."""
        return (self.quadratic * length + self.linear) * length


def costs_of_flops(flops_per_token: Callable[[int], float], seq_len: int) -> CostModel:
    """Estimate the costs from a model's FLOPs per token at a length (`models.costs.flops_per_token`), in FLOPs.

    That convention counts both halves of attention's scores, of which one is computed, at about `ATTENTION_SPEED` of the speed
    of matrix products. The start of a row's kernels takes as long as `ROW_TOKENS` tokens.
    """
    linear = flops_per_token(0)
    quadratic = (flops_per_token(seq_len) - linear) / seq_len / 2 / ATTENTION_SPEED
    return CostModel(quadratic, linear, ROW_TOKENS * linear)


def least_time(lengths: Sequence[int], ranks: int, capacity: int, costs: CostModel) -> float:
    """Return a lower bound on the time of the slowest rank: all costs, those of the least number of rows too, shared evenly.

    capacity: tokens of a row at most. No assignment of any kind is faster, whatever it cuts.
    """
    rows = -(-sum(lengths) // capacity)
    return (sum(map(costs.document, lengths)) + rows * costs.row) / ranks
