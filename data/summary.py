"""The amount of data: tokens and samples that train, and that are held out, for each source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .corpus import Corpus, Packed
from .mixture import Mixture
from .node import DataNode
from .samples.packing import BestFit, Concatenated
from .tokenizing.split import is_near

TOLD_PADDING = 0.01  # less goes without saying


@dataclass(frozen=True)
class SourceSize:
    """Tokens, documents and samples of a source; those held out are 0 where nothing is.

    name    "" where there is but one
    weight  its share of the samples of a mixture; 1 where there is but one
    asked   the share that was to be held out; None where that is not known
    padding share of the positions of its samples that is padding, in [0, 1)
    """

    name: str
    weight: float
    tokens: int
    documents: int
    samples: int
    held_tokens: int
    held_documents: int
    held_samples: int
    asked: float | None
    padding: float

    @property
    def held_share(self) -> float:
        """Share of all tokens that is held out."""
        return self.held_tokens / (self.tokens + self.held_tokens)


def packed_sources(node: DataNode, name: str = "", weight: float = 1.0) -> Iterator[tuple[str, float, Packed]]:
    """Yield name, weight and node of each source of a mixture, or of the node itself; nothing where there are no documents."""
    if isinstance(node, Mixture):
        total = sum(node.weights.values())
        for part, source in node.nodes.items():
            yield from packed_sources(source, f"{name}.{part}" if name else part, weight * node.weights[part] / total)
    elif isinstance(node, Packed):
        yield name, weight, node


def source_sizes(node: DataNode) -> Iterator[SourceSize]:
    """Yield the size of each source of a prepared node; nothing where there are no documents."""
    for name, weight, source in packed_sources(node):
        train, held, samples = source.shards, source.validation_shards, source.validation()
        yield SourceSize(
            name,
            weight,
            train.tokens,
            train.documents,
            len(source.stored),
            0 if held is None else held.tokens,
            0 if held is None else held.documents,
            0 if samples is None else len(samples),
            source.asked_share if isinstance(source, Corpus) else None,
            source.stored.padding if isinstance(source.stored, Concatenated | BestFit) else 0.0,
        )


def data_notices(node: DataNode) -> list[str]:
    """Say how many tokens of each source train and are held out."""
    return [
        f"data{f' {size.name}' if size.name else ''}: {size.tokens:,} tokens train, and "
        + (f"{size.held_tokens:,} ({size.held_share:.2%}) are held out" if size.held_tokens else "none are held out")
        + (f"; {size.padding:.1%} of its positions are padding" if size.padding >= TOLD_PADDING else "")
        for size in source_sizes(node)
    ]


def data_warnings(node: DataNode, key: str = "data") -> list[str]:
    """Say of which sources far more or less is held out than was asked for."""
    return [
        f"{key}{f'.sources.{size.name}' if size.name else ''}.validation: {size.asked:.2%} of the tokens were to be held out, "
        f"and {size.held_share:.2%} are; documents are held out whole under data.version=1, and copies all or none"
        for size in source_sizes(node)
        if size.asked and not is_near(size.held_tokens, size.tokens + size.held_tokens, size.asked)
    ]
