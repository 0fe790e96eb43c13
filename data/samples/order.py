"""Data order (R1): a pure keyed bijection per epoch, so that the k-th sample is a function of (recipe, seed, k) alone.

Nothing is stored: no permutation array, no generator state. The number of samples consumed is the only state.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from ...config.hashing import hash64, mix64, mix64_array, stream64
from ...config.lazy import numpy as np
from ..batch import Sample, Samples
from .rearranged import Rearranged

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROUNDS = 8
_TABLE = 4096  # sets up to this size are sorted by hash: a network over so few values reaches only some of their orders


class Permutation:
    """A keyed bijection of [0, size). It takes O(1) memory, and a few microseconds a look-up.

    A generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, method 3) over
    Z_a × Z_b with a·b ≥ size, a ≈ b ≈ √size. Rounds add a hash of one half to the other half, by turns. A result outside
    [0, size) is sent through again (cycle walking), which is rare because a·b − size < √size + 1. Small sets have a table
    instead, of at most 32 KiB.
    """

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation of {size} items; at least 1 is needed")
        self.size = size
        self.key = key
        self._table = np.argsort(stream64(hash64(key), size), kind="stable") if size <= _TABLE else None
        self._rows = math.isqrt(size)
        self._columns = -(-size // self._rows)
        self._keys = [hash64(key, number) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return the image of `index` in [0, size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside [0, {self.size})")
        if self._table is not None:
            return int(self._table[index])
        rows, columns = self._rows, self._columns
        while True:
            row, column = divmod(index, columns)
            for number in range(0, _ROUNDS, 2):
                row = (row + mix64(self._keys[number] + column)) % rows
                column = (column + mix64(self._keys[number + 1] + row)) % columns
            index = row * columns + column
            if index < self.size:
                return index

    def map(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Apply `__call__` to every element, vectorised."""
        found = np.array(indices, dtype=np.uint64).ravel()
        if found.size and int(found.max()) >= self.size:
            raise IndexError(f"an index is outside [0, {self.size})")
        if self._table is not None:
            return self._table[found].reshape(np.shape(indices))
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        walking = np.arange(found.size)
        while walking.size:
            row, column = np.divmod(found[walking], columns)
            for number in range(0, _ROUNDS, 2):
                # Reduced before the sum, which could pass 2^64. Python's integers in __call__ can't overflow.
                row = (row + mix64_array(column + np.uint64(self._keys[number])) % rows) % rows
                column = (column + mix64_array(row + np.uint64(self._keys[number + 1])) % columns) % columns
            found[walking] = row * columns + column
            walking = walking[found[walking] >= self.size]
        return found.astype(np.int64).reshape(np.shape(indices))


@lru_cache(maxsize=64)
def _epoch_permutation(size: int, seed: int, epoch: int) -> Permutation:
    return Permutation(size, hash64(seed, epoch))


def shuffled_position(index: int, size: int, seed: int) -> tuple[int, int]:
    """Locate sample number `index` of an endless run over `size` samples: (epoch, position in the data set)."""
    epoch, within = divmod(index, size)
    return epoch, _epoch_permutation(size, seed, epoch)(within)


class StoredSamples(Protocol):
    """A finite data set of samples of `seq_len` tokens, randomly accessible, in the order they are stored."""

    seq_len: int
    vocabulary: int

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at a position in [0, len)."""
        ...


class Shuffled(Rearranged):
    """Samples in training order: endless, every sample once per epoch, a new order each epoch. Implements `Samples`."""

    def __init__(self, stored: StoredSamples, seed: int) -> None:
        super().__init__(stored)
        self.stored = stored
        self.seed = seed
        self.epoch_size = len(stored)

    def place(self, index: int) -> tuple[Samples, int]:
        """Return the position of the k-th sample of the run."""
        return self.stored, shuffled_position(index, self.epoch_size, self.seed)[1]


class ValidationSamples(Rearranged):
    """Samples in validation order: finite, the same for every seed, shuffled so that the first ones represent the whole."""

    def __init__(self, stored: StoredSamples) -> None:
        super().__init__(stored)
        self.stored = stored
        self._order = Permutation(len(stored), key=0)

    def __len__(self) -> int:
        return self._order.size

    def place(self, index: int) -> tuple[Samples, int]:
        """Return the position of the k-th sample of the validation set."""
        return self.stored, self._order(index)
