"""Token shards: a folder of memory-mapped token files with document boundaries, described by `dataset.json`.

    dataset.json          format, version, vocabulary, dtype, end-of-document token, tokenizer, shards, fingerprint
    tokenizer.json        the tokenizer that made the tokens, where there is one
    tokens-00000.bin      token ids, uint16 or uint32, little endian, documents one behind the other
    documents-00000.bin   uint64, little endian: where each document of this shard ends, counted from the shard's first token
    learned-00000.bin     uint8: 1 for a token that carries loss as a target, else 0; absent where all of them do

A document never crosses shards. Sizes are checked whenever a folder is opened, contents (xxh3) on request, and token ids
against the vocabulary each time they are read.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from ...config.names import name_fault
from ..byte_progress import CountBytes

FORMAT = "meshloom-tokens"
VERSION = 1
MANIFEST = "dataset.json"
TOKENIZER = "tokenizer.json"
DOCUMENT_TYPE = "<u8"


class ShardError(ValueError):
    """A token shard folder that can't be trusted. The message names the file."""


@dataclass(frozen=True)
class FileEntry:
    """A file of the folder: its name, size in bytes and xxh3-128 of its contents."""

    name: str
    bytes: int
    xxh3: str

    def __post_init__(self) -> None:
        """Raises ShardError for a name that leads out of the folder."""
        if fault := name_fault(self.name):
            raise ShardError(f"{MANIFEST}: {fault}")


@dataclass(frozen=True)
class ShardEntry:
    """A pair of files, and how many tokens and documents they hold.

    learned  a third file, where there is a loss mask
    """

    tokens: FileEntry
    documents: FileEntry
    token_count: int
    document_count: int
    learned: FileEntry | None = None


@dataclass(frozen=True)
class ShardManifest:
    """The content of `dataset.json`, apart from its fingerprint."""

    vocabulary: int
    dtype: str
    end_of_document: int | None
    tokenizer: FileEntry | None
    shards: tuple[ShardEntry, ...]
    format: str = FORMAT
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """The xxh3-128 of the manifest, digests of all files included. It names the data set by its contents."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.stated(), sort_keys=True).encode())

    def stated(self) -> dict[str, Any]:
        """Return the content as JSON values; a shard without a loss mask names none."""
        found = asdict(self)
        for shard in found["shards"]:
            if shard["learned"] is None:
                del shard["learned"]
        return found

    @classmethod
    def read(cls, folder: Path) -> ShardManifest:
        """Parse `dataset.json`. Raises ShardError where it is missing, damaged or of another version."""
        path = folder / MANIFEST
        try:
            stated: dict[str, Any] = json.loads(path.read_text())
            if stated["format"] != FORMAT or stated["version"] != VERSION:
                found = f"{stated['format']} version {stated['version']}"
                raise ShardError(f"{path}: {found}; this program reads {FORMAT} version {VERSION}")
            fingerprint = stated.pop("fingerprint")
            shards = tuple(
                ShardEntry(
                    FileEntry(**shard.pop("tokens")),
                    FileEntry(**shard.pop("documents")),
                    learned=FileEntry(**shard.pop("learned")) if "learned" in shard else None,
                    **shard,
                )
                for shard in stated.pop("shards")
            )
            tokenizer = stated.pop("tokenizer")
            manifest = cls(shards=shards, tokenizer=None if tokenizer is None else FileEntry(**tokenizer), **stated)
        except ShardError as problem:
            if str(path) in str(problem):
                raise
            raise ShardError(f"{folder}/{problem}") from problem  # a name that leads out of the folder
        except FileNotFoundError:
            raise ShardError(
                f"{path}: not found; give a folder written by 'meshloom data tokenize', or a complete copy of one"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as problem:
            raise ShardError(
                f"{path}: damaged ({type(problem).__name__}: {problem}); copy or build the data set again"
            ) from problem
        if manifest.fingerprint != fingerprint:
            raise ShardError(f"{path}: damaged (its fingerprint does not fit its content); copy or build the data set again")
        return manifest

    def write(self, folder: Path) -> None:
        """Write `dataset.json` and wait until it is on disk."""
        with (folder / MANIFEST).open("w") as file:
            json.dump({**self.stated(), "fingerprint": self.fingerprint}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def digest_file(path: Path, count: CountBytes | None = None) -> str:
    """Compute the xxh3-128 of a file's contents. count: told the bytes that were read. Raises OSError naming the file."""
    state = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                state.update(block)
                if count is not None:
                    count(len(block))
    except OSError as error:
        raise named_error(error, path) from error
    return state.hexdigest()


def named_error(error: OSError, path: Path) -> OSError:
    """Return an error of the system with the name of its file, which an error of reading an open one lacks."""
    return error if error.filename is not None or error.errno is None else OSError(error.errno, error.strerror, str(path))
