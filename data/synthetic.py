"""Seeded random tokens of any vocabulary and length: for benchmarks and dry runs, where only shapes matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from ..config.hashing import hash64, stream64
from ..config.lazy import numpy as np
from ..config.problems import Problem
from .batch import Sample
from .config import SyntheticConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray


class RandomTokens:
    """Uniform tokens; sample k is a function of (seed, k). `length` makes it finite. Implements `Samples`."""

    def __init__(self, seq_len: int, vocabulary: int, seed: int, length: int | None = None) -> None:
        self.seq_len = seq_len
        self.vocabulary = vocabulary
        self._seed = seed
        self._length = length

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("endless samples have no length")
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """Return the k-th sample."""
        if index < 0 or (self._length is not None and index >= self._length):
            raise IndexError(f"sample {index} is outside [0, {self._length})")
        numbers = stream64(hash64(self._seed, index), self.seq_len + 1)
        # Multiply and shift instead of a modulo: the upper 32 bits, scaled to [0, vocabulary).
        tokens = (((numbers >> np.uint64(32)) * np.uint64(self.vocabulary)) >> np.uint64(32)).astype(np.int64)
        return Sample(tokens[:-1], tokens[1:])

    def lengths(self, index: int) -> NDArray[np.int64]:
        """Return the lengths of a sample's documents: it is one."""
        return np.array([self.seq_len], np.int64)

    def part(self, index: int, start: int, stop: int) -> Sample:
        """Return the tokens and targets of positions [start, stop) of a sample."""
        return self[index].part(start, stop)


class Synthetic:
    """The data node of `data=synthetic`: uniform noise, so the loss can't fall below log(vocabulary)."""

    tokenizer = None

    def __init__(self, config: SyntheticConfig, seed: int) -> None:
        self.seed = seed
        self.seq_len = config.seq_len
        self.vocabulary = config.vocabulary or 0
        self.validation_samples = config.validation_samples

    def problems(self, key: str = "data") -> list[Problem]:
        """Return what is wrong with the node's keys."""
        found: list[Problem] = []
        if self.seq_len < 1:
            found.append(Problem(f"{key}.seq_len", f"{self.seq_len} is not a length", "use 1 or more"))
        if not 1 <= self.vocabulary < 2**32:
            found.append(
                Problem(
                    f"{key}.vocabulary", f"{self.vocabulary} is not a vocabulary", "use 1 to 2^32 - 1, or set model.vocabulary"
                )
            )
        if self.validation_samples < 0:
            found.append(Problem(f"{key}.validation_samples", f"{self.validation_samples} is negative", "use 0 for none"))
        return found

    def prepare(self) -> None:
        """Do nothing: there is nothing to build."""

    @property
    def fingerprint(self) -> str:
        """Digest that names the data: nodes of the same fingerprint and seed give the same samples."""
        return xxhash.xxh3_128_hexdigest(f"synthetic {self.seq_len} {self.vocabulary}".encode())

    def train(self) -> RandomTokens:
        """Return the endless training samples."""
        return RandomTokens(self.seq_len, self.vocabulary, hash64(self.seed, 0))

    def validation(self) -> RandomTokens | None:
        """Return the validation set, the same for every seed; None for none."""
        if not self.validation_samples:
            return None
        return RandomTokens(self.seq_len, self.vocabulary, hash64(0, 1), self.validation_samples)
