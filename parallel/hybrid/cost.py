"""The cost of a document to a rank, and the least time that a step of given documents can take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...config.lazy import numpy as np
from ...models.config import DecoderConfig
from ...models.costs import parameter_count

ATTENTION_SPEED = 0.8  # FLOPs per second of attention over those of matrix products, on an H200 in bf16
ROW_TOKENS = 512


@dataclass(frozen=True)
class CostModel:
    """Costs of documents by their lengths, in seconds or any other unit.

    quadratic  of layers without a window: times n² for a document of n tokens
    linear     times n
    row        of each micro-batch
    windows    (window, factor) of layers whose queries see only so many positions: the factor is times twice the pairs of a
               query and a key that it sees, a query's own key by half. Where n is no more than the window that is n², too
    """

    quadratic: float
    linear: float
    row: float = 0.0
    windows: tuple[tuple[int, float], ...] = ()

    def document(self, length: int) -> float:
        """Return the cost of a document on one rank; n ranks that share it take an n-th each."""
        cost = (self.quadratic * length + self.linear) * length
        for window, factor in self.windows:
            seen = min(length, window)
            cost += factor * (seen * (2 * length - seen + 1) - length)
        return cost

    def documents(self, lengths: Sequence[int]) -> list[float]:
        """Return the cost of each document on one rank."""
        n = np.array(lengths, np.float64)
        cost = (self.quadratic * n + self.linear) * n
        for window, factor in self.windows:
            seen = np.minimum(n, window)
            cost += factor * (seen * (2 * n - seen + 1) - n)
        return cost.tolist()


def decoder_flops(config: DecoderConfig) -> CostModel:
    """Count the FLOPs of documents by the convention of `models.costs.flops_per_token`, each at its own length."""
    factors: dict[int | None, float] = {}
    for block in config.blocks():
        window = block.attention.window
        factors[window] = factors.get(window, 0.0) + 3 * block.attention.score_flops(1)
    linear = 6.0 * parameter_count(config, embedding=False, active=True)
    quadratic = factors.pop(None, 0.0)
    return CostModel(quadratic, linear, windows=tuple((window, f) for window, f in factors.items() if window is not None))


def module_flops(flops_per_token: Callable[[int], float], seq_len: int) -> CostModel:
    """Count the FLOPs of documents of a user's module, which tells them per token at a length; without windows."""
    linear = flops_per_token(0)
    return CostModel((flops_per_token(seq_len) - linear) / seq_len, linear)


def costs_of(flops: CostModel) -> CostModel:
    """Estimate the costs of documents, in FLOPs of matrix products, from their FLOPs.

    That convention counts both halves of attention's scores, of which one is computed, at about `ATTENTION_SPEED` of the speed
    of matrix products. The start of a row's kernels takes as long as `ROW_TOKENS` tokens.
    """
    part = 1 / 2 / ATTENTION_SPEED
    windows = tuple((window, factor * part) for window, factor in flops.windows)
    return replace(flops, quadratic=flops.quadratic * part, row=ROW_TOKENS * flops.linear, windows=windows)


def least_time(lengths: Sequence[int], ranks: int, capacity: int, costs: CostModel) -> float:
    """Return a lower bound on the time of the slowest rank: all costs, those of the least number of rows too, shared evenly.

    capacity: tokens of a row at most. No assignment of any kind is faster, whatever it cuts.
    """
    rows = -(-sum(lengths) // capacity)
    return (sum(costs.documents(lengths)) + rows * costs.row) / ranks
