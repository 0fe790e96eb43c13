"""Blending: samples of several sources by weight, as a pure function of the sample's number (R1)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate

from ...config.hashing import hash64
from ..batch import Samples
from .order import Permutation
from .rearranged import Rearranged


def apportion(weights: Sequence[float], places: int) -> list[int]:
    """Divide `places` among weights in whole numbers, by the method of largest remainders."""
    quotas = [weight * places / sum(weights) for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda source: (counts[source] - quotas[source], source))
    for source in by_remainder[: places - sum(counts)]:
        counts[source] += 1
    return counts


class Blend:
    """The map k → (source, number of the sample within the source). A look-up takes a few microseconds.

    Samples come in blocks. Each block holds the same number of samples of each source, in an order of its own. Within a
    source, numbers run 0, 1, 2, … over the blocks: none is left out, none comes twice.

    counts  samples of each source per block
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self.counts = list(counts)
        self._limits = list(accumulate(counts))
        self._seed = seed
        self._order = lru_cache(maxsize=16)(self._order_of)

    def _order_of(self, block: int) -> Permutation:
        return Permutation(self._limits[-1], hash64(self._seed, block))

    def __call__(self, index: int) -> tuple[int, int]:
        """Return (source, number within it) of the k-th sample of the run."""
        block, within = divmod(index, self._limits[-1])
        slot = self._order(block)(within)
        source = bisect_right(self._limits, slot)
        return source, block * self.counts[source] + slot - (self._limits[source] - self.counts[source])

    def numbers(self, count: int, more: Iterable[int] = ()) -> list[tuple[int, list[int]]]:
        """Return which samples of each source the first `count` samples of the run are, and those of the numbers in `more`.

        (n, further) of each source: its numbers 0 to n - 1, and these further ones.
        """
        blocks, rest = divmod(count, self._limits[-1])
        found = [(blocks * each, list[int]()) for each in self.counts]
        for index in (*range(count - rest, count), *more):
            source, number = self(index)
            found[source][1].append(number)
        return found


class MixedSamples(Rearranged):
    """Endless training samples of several sources. Implements `Samples`."""

    def __init__(self, sources: Sequence[Samples], counts: Sequence[int], seed: int) -> None:
        super().__init__(sources[0])
        self.sources = list(sources)
        self.blend = Blend(counts, seed)

    def place(self, index: int) -> tuple[Samples, int]:
        """Return the source of the k-th sample of the run, and its number there."""
        source, within = self.blend(index)
        return self.sources[source], within
