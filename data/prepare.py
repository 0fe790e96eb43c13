"""Build the tokenizer and the train and validation shards of a corpus once, in the cache."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from ..config.cache import build_once
from ..config.lazy import numpy as np
from .shards import TOKENIZER, ShardWriter
from .sources import DocumentSource
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BATCH = 1 << 22  # characters tokenised in one go
_RECIPE_VERSION = 1  # raise it when the same input is turned into other tokens


@contextmanager
def _progress(what: str, total: int | None) -> Generator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)
        progress.update(task, total=1, completed=1)  # the total was a guess


def _content_hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def uniform_sample(documents: Iterable[str], characters: int) -> list[str]:
    """Sample documents of at most so many characters in all (at least one): those with the smallest content hash.

    The choice is uniform, and depends neither on their order nor on a generator's state. `characters` bounds the memory.
    """
    kept: list[tuple[int, int, str]] = []
    total = 0
    for number, text in enumerate(documents):
        heapq.heappush(kept, (-_content_hash(text), number, text))
        total += len(text)
        while total > characters and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2])
    return [text for _, _, text in sorted(kept, reverse=True)]


def train_tokenizer(sources: Sequence[DocumentSource], vocabulary: int, characters: int, cache: Path) -> Tokenizer:
    """Train a BPE tokenizer on a uniform sample of the sources, or load it from the cache."""
    inputs = [_RECIPE_VERSION, [source.identity(cache / "identities") for source in sources], vocabulary, characters]
    name = xxhash.xxh3_128_hexdigest(json.dumps(inputs).encode())
    target = cache / "tokenizers" / f"bpe-{vocabulary}-{name[:16]}"

    def build(folder: Path) -> None:
        with _progress(f"training a tokenizer of {vocabulary} tokens", None):
            sample = [text for source in sources for text in uniform_sample(source.documents(), characters // len(sources))]
            if not sample:
                raise ValueError(f"the corpus '{', '.join(source.name for source in sources)}' is empty")
            Tokenizer.train(sample, vocabulary).save(folder / TOKENIZER)

    build_once(target, build)
    return Tokenizer.load(target)


@dataclass(frozen=True)
class ValidationSplit:
    """The split into training and validation data: a document whose content hash is in the lowest `fraction` is held out.

    Copies of a document land on the same side, whatever the order of the files.
    """

    fraction: float

    def __call__(self, text: str) -> bool:
        """Return whether this document is validation data."""
        return _content_hash(text) < self.fraction * 2.0**64


def tokenize_corpus(source: DocumentSource, tokenizer: Tokenizer, validation: float, cache: Path) -> Path:
    """Tokenise a source, or find it in the cache. Returns the folder of the shards `train` and, if held out, `validation`."""
    inputs = [_RECIPE_VERSION, source.identity(cache / "identities"), tokenizer.fingerprint, validation]
    name = xxhash.xxh3_128_hexdigest(json.dumps(inputs).encode())
    target = cache / "corpora" / f"{source.name}-{name[:16]}"
    build_once(target, lambda folder: write_corpus(source, tokenizer, validation, folder))
    return target


def write_corpus(
    source: DocumentSource, tokenizer: Tokenizer, validation: float, folder: Path, shard_tokens: int = 1 << 30
) -> None:
    """Tokenise a source into `folder/train` and, where a fraction is held out, `folder/validation`.

    Where the hash holds out nothing, the first document is held out, and of a corpus of one document its end.
    Raises ValueError for an empty corpus.
    """
    with (
        ShardWriter(folder / "train", tokenizer.vocabulary, tokenizer.end_of_document, tokenizer.save, shard_tokens) as train,
        _progress(f"tokenising {source.name}", source.size()) as advance,
    ):
        if not validation:
            for _, tokens in _tokenized(source, tokenizer, lambda text: False, advance):
                train.add(tokens)
            _refuse_empty(source, train)
            return
        with ShardWriter(
            folder / "validation", tokenizer.vocabulary, tokenizer.end_of_document, tokenizer.save, shard_tokens
        ) as held:
            spare: NDArray[np.int64] | None = None  # the first document for training, while nothing is held out yet
            for is_held, tokens in _tokenized(source, tokenizer, ValidationSplit(validation), advance):
                if is_held:
                    held.add(tokens)
                elif spare is None and not held.documents:
                    spare = tokens
                else:
                    train.add(tokens)
            if spare is not None and held.documents:
                train.add(spare)
            elif spare is not None and train.documents:
                held.add(spare)
            elif spare is not None:
                cut = len(spare) - max(1, round(len(spare) * validation))
                train.add(spare[:cut])
                held.add(spare[cut:])
            if spare is None and held.documents and not train.documents:
                held_out = f"all {held.documents} documents of the corpus '{source.name}' are held out"
                raise ValueError(f"{held_out}, and none is left to train on; use a smaller data.validation")
            _refuse_empty(source, train)


def _refuse_empty(source: DocumentSource, train: ShardWriter) -> None:
    if not train.documents:
        raise ValueError(f"the corpus '{source.name}' has no document to train on")


def _tokenized(
    source: DocumentSource, tokenizer: Tokenizer, is_held: Callable[[str], bool], advance: Callable[[int], None]
) -> Iterator[tuple[bool, NDArray[np.int64]]]:
    batch: list[str] = []
    waiting = 0

    def encoded() -> Iterator[tuple[bool, NDArray[np.int64]]]:
        yield from zip((is_held(text) for text in batch), tokenizer.encode_documents(batch), strict=True)
        advance(waiting)

    for text in source.documents():
        batch.append(text)
        waiting += len(text)
        if waiting >= _BATCH:
            yield from encoded()
            batch, waiting = [], 0
    yield from encoded()
