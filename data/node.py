"""The interface between the trainer and a data node, wherever its tokens come from."""

from __future__ import annotations

from typing import Protocol

from ..config.problems import Problem
from .batch import Samples
from .samples.order import StoredSamples
from .tokenizing.tokenizer import Tokenizer
from .validation import WeightedParts


class DataNode(Protocol):
    """The object that the config group `data` builds. `problems` and `prepare` come first, in this order.

    seq_len  positions per sample
    """

    seq_len: int

    def problems(self, key: str = "data") -> list[Problem]:
        """Return what is wrong with the node's keys, without building or writing anything. key: the node's."""
        ...

    def prepare(self) -> None:
        """Build or find tokenizer and shards. Every process calls it; one builds, the others wait.

        Raises ConfigError for what only the data can show, ShardError for damaged files.
        """
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, once prepared, or None where tokens have no text."""
        ...

    @property
    def vocabulary(self) -> int:
        """Token ids lie in [0, vocabulary); known once prepared."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest that names the data, once prepared: nodes of the same fingerprint and seed give the same samples."""
        ...

    def train(self) -> Samples:
        """Return the endless training samples."""
        ...

    def validation(self) -> StoredSamples | WeightedParts | None:
        """Return the validation samples in a fixed order, those of several sources apart; None where nothing is held out."""
        ...
