"""Reading on where other data of a run has stopped: samples of a source that a run has read do not come again (R1).

A stage of a run may have other data, or another mixture of the same sources. The k-th sample of it is a function of the data's
recipe, the seed, k and which samples earlier stages have read of each source. A source is the same if its fingerprint and its
name are: another length of samples, for one, makes another source.

What was read of a source is a list of numbers, as JSON: the first sample that no stage has reached, then those before it that
were left out, because a mixture's block was not read to its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from .batch import Samples
from .mixture import Mixture
from .node import DataNode
from .samples.rearranged import Rearranged

Read: TypeAlias = Mapping[str, Sequence[int]]
"""Source → what was read of it: see the module."""


class Unread(Rearranged):
    """Samples of a source without those that were read."""

    def __init__(self, samples: Samples, read: Sequence[int]) -> None:
        super().__init__(samples)
        self._samples = samples
        self._next, *self._left = read

    def number(self, index: int) -> int:
        """Return the number of the k-th unread sample in its source."""
        left = len(self._left)
        return self._left[index] if index < left else self._next + index - left

    def place(self, index: int) -> tuple[Samples, int]:
        """Return the source, and the number of the k-th unread sample there."""
        return self._samples, self.number(index)


class Shifted(Rearranged):
    """Samples under shifted numbers: the k-th is the (k + by)-th of `samples`."""

    def __init__(self, samples: Samples, by: int) -> None:
        super().__init__(samples)
        self._samples, self._by = samples, by

    def place(self, index: int) -> tuple[Samples, int]:
        """Return the samples, and k + by."""
        return self._samples, index + self._by


def shifted(samples: Samples, by: int) -> Samples:
    """Return samples under numbers shifted by `by`."""
    return Shifted(samples, by) if by else samples


def read_on(node: DataNode, read: Read, name: str = "") -> Samples:
    """Return a prepared node's training samples, without those that were read of each source."""
    if isinstance(node, Mixture):
        return node.mixed([read_on(source, read, f"{name}/{part}") for part, source in node.nodes.items()])
    known = read.get(_source(node, name))
    return Unread(node.train(), known) if known else node.train()


def samples_read(node: DataNode, count: int, read: Read) -> dict[str, list[int]]:
    """Return what has been read of each source, after `count` samples of a node that began with `read`."""
    found = {source: list(known) for source, known in read.items()}
    for source, reached, more in _reached(node, count, (), ""):
        before = Unread(node.train(), found.get(source, [0]))
        here = {*more}
        stop = max([reached, *(number + 1 for number in here), len(found.get(source, [0])) - 1])
        left = [before.number(index) for index in range(reached, stop) if index not in here]
        found[source] = [before.number(stop), *left]
    return found


def _reached(node: DataNode, count: int, more: Iterable[int], name: str) -> Iterator[tuple[str, int, Iterable[int]]]:
    """Yield each source with the numbers that were read: 0 up to one, and more."""
    if not isinstance(node, Mixture):
        yield _source(node, name), count, more
        return
    numbers = node.train().blend.numbers(count, more)
    for (part, source), (reached, further) in zip(node.nodes.items(), numbers, strict=True):
        yield from _reached(source, reached, further, f"{name}/{part}")


def _source(node: DataNode, name: str) -> str:
    return f"{name} {node.fingerprint}".strip()
