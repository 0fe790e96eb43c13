"""The share of a row's activations that the host can keep at no cost in time: as much as is copied while its blocks compute.

ByteScale (arXiv 2502.21231) calls that share r*. Computation per token grows with a document's length, bytes per token do not:
of the longest documents most can be offloaded. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .cost import CostModel

FORWARD = 0.28
"""Share of the forward pass in both, in which copies to the host must end: a third of products, 2 sevenths of attention."""

PINNED = 4
"""Host memory that rows may pin over what one keeps there: PyTorch rounds pinned tensors up to powers of two, and a host that
runs ahead begins a row's copies while those of the one before it are still there."""


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
        seconds = sum(self.costs.document(length) / ranks for length, ranks in parts)
        return self._share(seconds, sum(length / ranks for length, ranks in parts))

    def layers(self, rings: Sequence[int], layers: int) -> frozenset[int]:
        """Return which of so many blocks keep their activations on the host."""
        return spread_blocks(int(self.share(rings) * layers), layers)

    def layers_of_any_row(self, tokens: int, layers: int) -> frozenset[int]:
        """Return the blocks of a full row of so many tokens that are on the host whatever its documents.

        Those of the shortest documents hide the fewest copies. A row that is not full leaves no more on the device: the share
        that computation hides does not depend on its tokens, and the host holds a larger part of it.
        """
        return spread_blocks(int(self._share(tokens * self.costs.document(1), tokens) * layers), layers)

    def most_bytes(self, tokens: int, longest: int, layers: int) -> float:
        """Return the bytes on the host at most of a row of up to so many tokens, of documents of up to `longest`."""
        hidden = replace(self, host_bytes=math.inf)._share(self.costs.document(longest), longest)
        on_host = len(spread_blocks(int(hidden * layers), layers))
        return min(on_host / layers * tokens * self.token_bytes, self.host_bytes)

    def _share(self, seconds: float, tokens: float) -> float:
        """Return the share of a row of so many tokens whose blocks take so many seconds."""
        kept = tokens * self.token_bytes
        return min(1.0, FORWARD * seconds * self.rate / kept, self.host_bytes / kept) if tokens else 0.0


def spread_blocks(count: int, layers: int) -> frozenset[int]:
    """Choose so many blocks, spread evenly over all but the last two, or all of those.

    The copies of one may then take as long as it is to the next. Of the last two blocks copies would make no room: they
    would come back when the device is fullest.
    """
    eligible = max(0, layers - 2)
    count = min(count, eligible)
    return frozenset(number * eligible // count for number in range(count))
