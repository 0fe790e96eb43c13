"""Build the tokenizer and the train and validation shards of a corpus once, in the cache."""

from __future__ import annotations

import heapq
import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import xxhash

from ...config.cache import build_once
from ...config.lazy import numpy as np
from ...config.progress_bar import Advance, progress
from ..documents.marked import MarkedText
from ..documents.sources import DocumentSource
from ..shards.manifest import TOKENIZER
from ..shards.reader import TokenShards
from ..shards.writer import ShardWriter
from ..version import NEWEST
from .fill_in_the_middle import FillInTheMiddle
from .split import PassageSplit, is_near
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

Documents: TypeAlias = "Iterator[tuple[str, NDArray[np.int64], NDArray[np.bool_] | None]]"
"""Documents of a corpus, each with its tokens, the end of the document among them, and which of them carry loss (None: all)."""

PARTS = ("train", "validation")
_BATCH = 1 << 22  # characters tokenised in one go
_TRAINER_VERSION = 2  # raise it when the same documents give another tokenizer
_SAMPLE_SALT = 1  # of the hash that draws the sample, so that it is independent of the one that holds documents out


def _content_hash(text: str, salt: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(), salt)


def uniform_sample(documents: Iterable[str], characters: int, salt: int = _SAMPLE_SALT) -> list[str]:
    """Sample documents of at most so many characters in all (at least one): those with the smallest content hash.

    The choice is uniform, and depends neither on their order nor on a generator's state. `characters` bounds the memory.
    salt: of the hash; 0 takes the hash that also holds documents out
    """
    kept: list[tuple[int, int, str]] = []
    total = 0
    for number, text in enumerate(documents):
        heapq.heappush(kept, (-_content_hash(text, salt), number, text))
        total += len(text)
        while total > characters and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2])
    return [text for _, _, text in sorted(kept, reverse=True)]


def training_sample(source: DocumentSource, characters: int, held_out: float, version: int) -> list[str]:
    """Sample the documents of a source for the training of a tokenizer, none that is held out as a whole.

    Under versions 1 and 2 of the rules the sample is of all documents, those held out first. Of a source that holds out all
    its documents, it is of all, too.
    """
    if version < 3:
        return uniform_sample(source.documents(), characters, salt=0)
    left = (text for text in source.documents() if not is_held_out(text, held_out))
    return uniform_sample(left, characters) or uniform_sample(source.documents(), characters)


def train_tokenizer(
    sources: Sequence[tuple[DocumentSource, float]],
    vocabulary: int,
    characters: int,
    cache: Path,
    version: int = NEWEST,
    *,
    fim: bool = False,
) -> Tokenizer:
    """Train a BPE tokenizer on uniform samples of the sources (`training_sample`), or load it from the cache.

    sources: each with the share of it that is held out. version: of the rules (`version.py`). fim: see `Tokenizer.bytes`
    """
    identities = [source.identity(cache / "identities") for source, _ in sources]
    inputs = [1 if version < 3 else _TRAINER_VERSION, identities, vocabulary, characters]
    inputs += ["fim"] if fim else []
    inputs += [] if version < 3 else [[held_out for _, held_out in sources]]
    name = xxhash.xxh3_128_hexdigest(json.dumps(inputs).encode())
    target = cache / "tokenizers" / f"bpe-{vocabulary}-{name[:16]}"

    def build(folder: Path) -> None:
        with progress(f"training a tokenizer of {vocabulary} tokens", announce=True):
            part = characters // len(sources)
            sample = [text for source, held_out in sources for text in training_sample(source, part, held_out, version)]
            if not sample:
                raise ValueError(f"the corpus '{', '.join(source.name for source, _ in sources)}' is empty")
            Tokenizer.train(sample, vocabulary, fim=fim).save(folder / TOKENIZER)

    build_once(target, build)
    return Tokenizer.load(target)


def is_held_out(text: str, share: float) -> bool:
    """Return whether a document is held out as a whole: whether its content hash is among the lowest `share` of all hashes."""
    return _content_hash(text) < share * 2.0**64


def tokenize_corpus(
    source: DocumentSource,
    tokenizer: Tokenizer,
    validation: float,
    cache: Path,
    version: int,
    fim: FillInTheMiddle | None = None,
) -> Path:
    """Tokenise a source, or find it in the cache. Returns the folder of the shards `train` and, if held out, `validation`."""
    same = fim is None or not validation  # as version 2 makes them
    inputs = [min(version, 2) if same else version, source.identity(cache / "identities"), tokenizer.fingerprint, validation]
    inputs += [] if fim is None else [["fim", fim.rate, fim.spm_rate, fim.seed]]
    name = xxhash.xxh3_128_hexdigest(json.dumps(inputs).encode())
    target = cache / "corpora" / f"{source.name}-{name[:16]}"
    build_once(target, lambda folder: write_corpus(source, tokenizer, validation, folder, version=version, fim=fim))
    return target


def write_corpus(
    source: DocumentSource,
    tokenizer: Tokenizer,
    validation: float,
    folder: Path,
    shard_tokens: int = 1 << 30,
    version: int = NEWEST,
    fim: FillInTheMiddle | None = None,
) -> None:
    """Tokenise a source into `folder/train` and, where a share is held out, `folder/validation`.

    Raises ValueError for an empty corpus.
    """

    def writer(place: Path) -> ShardWriter:
        ends = tokenizer.end_of_document
        return ShardWriter(place, tokenizer.vocabulary, ends, tokenizer.save, shard_tokens, masked=source.masked)

    with progress(f"tokenising {source.name}", announce=True) as advance:
        documents = _tokenized(source, tokenizer, version, advance, fim)
        if not validation:
            with writer(folder / "train") as train:
                for _, tokens, learned in documents:
                    train.add(tokens, learned)
                _refuse_empty(source, train)
        elif version == 1:
            _write_split_1(source, documents, validation, writer, folder)
        else:
            _write_split(source, documents, validation, writer, folder, copies_differ=fim is not None and version >= 3)


def _write_split(
    source: DocumentSource,
    documents: Documents,
    share: float,
    writer: Callable[[Path], ShardWriter],
    folder: Path,
    *,
    copies_differ: bool,
) -> None:
    """Hold out whole documents by their hash; passages, if that does not come near the share.

    copies_differ: see `PassageSplit`
    """
    parts = [writer(folder / name) for name in PARTS]
    hashes = array("Q")
    try:
        for text, tokens, learned in documents:
            hashes.append(_content_hash(text))
            parts[is_held_out(text, share)].add(tokens, learned)
        train, held = parts
        if not train.documents and not held.documents:
            _refuse_empty(source, train)
        if is_near(held.tokens, train.tokens + held.tokens, share):
            train.commit()
            held.commit()
            return
        for part in parts:
            if part.documents:
                part.commit()
            else:
                part.abandon()
    except BaseException:
        for part in parts:
            part.abandon()
        raise
    _split_again(np.frombuffer(hashes, np.uint64), share, writer, folder, copies_differ=copies_differ)


def _split_again(
    hashes: NDArray[np.uint64], share: float, writer: Callable[[Path], ShardWriter], folder: Path, *, copies_differ: bool
) -> None:
    """Replace the parts that hold whole documents by parts of which one has passages.

    hashes: of the documents, in the order in which they were written. copies_differ: see `PassageSplit`
    """
    whole = folder / "whole"
    whole.mkdir()
    for name in PARTS:
        if (folder / name).exists():
            (folder / name).rename(whole / name)
    parts = {name: TokenShards(whole / name) for name in PARTS if (whole / name).exists()}
    positions = {name: iter(_spans(shards)) for name, shards in parts.items()}
    order = [PARTS[hash_ < share * 2.0**64] for hash_ in hashes.tolist()]
    lengths = np.empty(len(order), np.int64)
    spans: list[tuple[int, int]] = []
    for number, name in enumerate(order):
        spans.append(next(positions[name]))
        lengths[number] = spans[-1][1] - spans[-1][0]
    split = PassageSplit(hashes, lengths, share, copies_differ=copies_differ)
    with writer(folder / PARTS[0]) as train, writer(folder / PARTS[1]) as held:
        for number, (name, (first, _)) in enumerate(zip(order, spans, strict=True)):
            for passage in split.passages(number):
                start, stop = first + passage.start, first + passage.stop
                learned = parts[name].learned(np.arange(start, stop)) if parts[name].masked else None
                (held if passage.held_out else train).add(parts[name].read(start, stop), learned)
    shutil.rmtree(whole)


def _spans(shards: TokenShards) -> Iterator[tuple[int, int]]:
    """Yield where each document begins and ends."""
    first = 0
    for length in shards.document_lengths().tolist():
        yield first, first + length
        first += length


def _write_split_1(
    source: DocumentSource, documents: Documents, share: float, writer: Callable[[Path], ShardWriter], folder: Path
) -> None:
    """Hold out whole documents by their hash; if that is none, the first one, and of a single document its end."""
    with writer(folder / "train") as train, writer(folder / "validation") as held:
        spare: NDArray[np.int64] | None = None  # the first document for training, while nothing is held out yet
        for text, tokens, _ in documents:
            if is_held_out(text, share):
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
            cut = len(spare) - max(1, round(len(spare) * share))
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
    source: DocumentSource,
    tokenizer: Tokenizer,
    version: int,
    advance: Advance,
    fim: FillInTheMiddle | None,
) -> Documents:
    batch: list[str] = []
    size = source.size() or 0
    waiting = done = read = 0
    for text in source.documents():
        batch.append(text)
        waiting += len(text)
        if waiting >= _BATCH:
            yield from _encoded(tokenizer, batch, version, done, fim)
            read += waiting
            advance(read, size)
            done += len(batch)
            batch, waiting = [], 0
    yield from _encoded(tokenizer, batch, version, done, fim)
    advance(read + waiting, size)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str], version: int, first: int, fim: FillInTheMiddle | None) -> Documents:
    """Encode documents of one kind. first: number of the first of them in its source."""
    if texts and isinstance(texts[0], MarkedText):
        marked = cast(Sequence[MarkedText], texts)
        yield from ((text, *encoded) for text, encoded in zip(texts, tokenizer.encode_marked(marked), strict=True))
        return
    cut = fim is not None
    found = fim.encode(tokenizer, first, texts) if cut else tokenizer.encode_documents(texts, in_pieces=version == 1)
    yield from ((text, tokens, None) for text, tokens in zip(texts, found, strict=True))
