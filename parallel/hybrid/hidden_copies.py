"""The share of a row's activations that the host can keep at no cost in time: as much as is copied while its blocks compute.

ByteScale (arXiv 2502.21231) calls that share r*. Computation per token grows with a document's length, bytes per token do not:
of the longest documents most can be offloaded. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .cost import CostModel

FORWARD = 0.28
"""Share of the forward pass in both, in which copies to the host must end: a third of products, 2 sevenths of attention."""


@dataclass(frozen=True)
class HiddenCopies:
    """The numbers that the share depends on.

    costs        seconds of documents, of both passes over all blocks, without embedding and head
    token_bytes  that all blocks together keep of a token
    rate         bytes per second between the device and its host, in each direction
    host_bytes   of a row on the host at most
    """

    costs: CostModel
    token_bytes: float
    rate: float
    host_bytes: float = math.inf

    def share(self, rings: Sequence[int]) -> float:
        """Return the share of a row's activations that is copied during its forward pass and fits on the host, in [0, 1].

        rings: the row's documents, as `context.ring_plan.plan_rings` reads them. Of a shared one a rank has a part of the
        computation, and the same part of the tokens.
        """
        count = rings[1]
        shared = [(rings[at], rings[at + 2]) for at in range(2, 2 + 3 * count, 3)]
        parts = [*shared, *((length, 1) for length in rings[2 + 3 * count :])]
        tokens = sum(length / ranks for length, ranks in parts)
        seconds = sum(self.costs.document(length) / ranks for length, ranks in parts)
        kept = tokens * self.token_bytes
        return min(1.0, FORWARD * seconds * self.rate / kept, self.host_bytes / kept) if tokens else 0.0

    def layers(self, rings: Sequence[int], layers: int) -> frozenset[int]:
        """Return which of so many blocks keep their activations on the host."""
        return spread_blocks(int(self.share(rings) * layers), layers)


def spread_blocks(count: int, layers: int) -> frozenset[int]:
    """Choose so many blocks, spread evenly over all but the last two, or all of those.

    The copies of one may then take as long as it is to the next. Of the last two blocks copies would make no room: they
    would come back when the device is fullest.
    """
    eligible = max(0, layers - 2)
    count = min(count, eligible)
    return frozenset(number * eligible // count for number in range(count))
