"""Writer of token shards: documents of tokens into a new folder, which appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from array import array
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import xxhash

from ...config.cache import sync_folder
from ...config.lazy import numpy as np
from .manifest import DOCUMENT_TYPE, TOKENIZER, FileEntry, ShardEntry, ShardManifest, digest_file

if TYPE_CHECKING:
    from numpy.typing import NDArray


class _DigestedFile:
    """A file whose digest is computed while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("wb")
        self._state = xxhash.xxh3_128()
        self._bytes = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._state.update(data)
        self._bytes += len(data)

    def close(self) -> FileEntry:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(self._path.name, self._bytes, self._state.hexdigest())

    def abandon(self) -> None:
        self._file.close()


class ShardWriter:
    """Writer that streams documents into a new shard folder, which appears under its name complete or not at all.

        with ShardWriter(folder, vocabulary=4096) as writer:
            writer.add(np.array([17, 4, 0]))

    Everything is written to a temporary folder beside it, forced to disk, and renamed when the `with` block ends without
    an error; otherwise the temporary folder is removed. An existing folder is never touched: FileExistsError.

    vocabulary       token ids lie in [0, vocabulary)
    end_of_document  the token that ends each document, for the record
    save_tokenizer   writes the tokenizer into the path it is given; None: the tokens come without one
    shard_tokens     a new pair of files is begun once a shard holds this many tokens
    masked           whether there is a loss mask
    """

    def __init__(
        self,
        folder: Path,
        vocabulary: int,
        end_of_document: int | None = None,
        save_tokenizer: Callable[[Path], None] | None = None,
        shard_tokens: int = 1 << 30,
        *,
        masked: bool = False,
    ) -> None:
        if folder.exists():
            raise FileExistsError(f"{folder} exists already; remove it or write to another folder")
        self.folder = folder
        self._vocabulary = vocabulary
        self._dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
        self._end_of_document = end_of_document
        self._shard_tokens = shard_tokens
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._building = folder.parent / f".{folder.name}.building-{uuid.uuid4().hex[:12]}"
        self._building.mkdir()
        self._tokenizer: FileEntry | None = None
        if save_tokenizer is not None:
            path = self._building / TOKENIZER
            try:
                save_tokenizer(path)
            except BaseException:
                shutil.rmtree(self._building, ignore_errors=True)
                raise
            self._tokenizer = FileEntry(path.name, path.stat().st_size, digest_file(path))
        self._shards: list[ShardEntry] = []
        self._masked = masked
        self._open: tuple[_DigestedFile, _DigestedFile, _DigestedFile | None] | None = None
        self._in_shard = 0
        self._ends_in_shard = array("Q")
        self.tokens = 0
        self.documents = 0

    def add(self, tokens: NDArray[np.integer[Any]], learned: NDArray[np.bool_] | None = None) -> None:
        """Append a document: a one-dimensional array of token ids. An empty one is skipped.

        learned: (tokens,) whether each carries loss; None: all of them do

        Raises ValueError for a token id outside the vocabulary.
        """
        if not len(tokens):
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocabulary:
            raise ValueError(
                f"document {self.documents} has token id {low if low < 0 else high}, outside [0, {self._vocabulary})"
            )
        if self._open is None:
            number = len(self._shards)
            self._open = (
                _DigestedFile(self._building / f"tokens-{number:05d}.bin"),
                _DigestedFile(self._building / f"documents-{number:05d}.bin"),
                _DigestedFile(self._building / f"learned-{number:05d}.bin") if self._masked else None,
            )
        self._open[0].write(tokens.astype(self._dtype).tobytes())
        if self._open[2] is not None:
            self._open[2].write(
                np.ones(len(tokens), np.uint8).tobytes() if learned is None else learned.astype(np.uint8).tobytes()
            )
        self._in_shard += len(tokens)
        self._ends_in_shard.append(self._in_shard)
        self.tokens += len(tokens)
        self.documents += 1
        if self._in_shard >= self._shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._open is None:
            return
        tokens, documents, learned = self._open
        documents.write(np.array(self._ends_in_shard, dtype=DOCUMENT_TYPE).tobytes())
        mask = None if learned is None else learned.close()
        self._shards.append(ShardEntry(tokens.close(), documents.close(), self._in_shard, len(self._ends_in_shard), mask))
        self._open, self._in_shard, self._ends_in_shard = None, 0, array("Q")

    def commit(self) -> ShardManifest:
        """Force everything to disk and give the folder its name. Raises ValueError for a corpus without a token."""
        if not self.documents:
            raise ValueError(f"{self.folder}: no token to write; the corpus is empty")
        self._close_shard()
        manifest = ShardManifest(
            self._vocabulary, self._dtype.name, self._end_of_document, self._tokenizer, tuple(self._shards)
        )
        manifest.write(self._building)
        sync_folder(self._building)
        # On POSIX a rename onto a folder that has files fails, so a folder that another process made meanwhile stays whole.
        self._building.rename(self.folder)
        sync_folder(self.folder.parent)
        return manifest

    def abandon(self) -> None:
        """Remove what was written so far."""
        if self._open is not None:
            for file in filter(None, self._open):
                file.abandon()
        shutil.rmtree(self._building, ignore_errors=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.abandon()
            return
        try:
            self.commit()
        except BaseException:
            self.abandon()
            raise
