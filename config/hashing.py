"""A stateless keyed 64-bit hash: the source of randomness for everything that must be a pure function (R1).

SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014; constants as in Vigna's
public-domain reference implementation). Gives the same numbers on every machine and with every numpy version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def mix64(word: int) -> int:
    """Apply SplitMix64's finaliser: a bijection of 64-bit words that flips about half of the bits for any change."""
    word &= _MASK
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)


def splitmix64(state: int) -> int:
    """Return SplitMix64's output in a state; its next state is `state + 0x9E3779B97F4A7C15`."""
    return mix64(state + _STEP)


def hash64(*words: int) -> int:
    """Hash a list of integers to 64 bits. Their order matters."""
    found = 0
    for word in words:
        found = splitmix64(found + word)
    return found


def mix64_array(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply `mix64` to every element. Return a new array."""
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(_FIRST)
    words ^= words >> np.uint64(27)
    words *= np.uint64(_SECOND)
    words ^= words >> np.uint64(31)
    return words


def stream64(key: int, count: int) -> NDArray[np.uint64]:
    """Return the first `count` outputs of SplitMix64 from the state `key`."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP)
    return mix64_array(steps + np.uint64(key & _MASK))
