"""The identity of a corpus: a digest of its files' contents and of the settings by which they are read, kept in the cache."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from ...config.cache import locked
from ...config.words import counted
from ..byte_progress import CountBytes, byte_progress, gigabytes
from ..shards.manifest import digest_file

LARGE = 1 << 26  # bytes of a file whose digest is kept by itself
_DIGITS = 32  # of a digest


def identity_of(files: Sequence[Path], settings: str, memo: Path) -> str:
    """Digest files' contents and settings. Files are read again only when a path, size, time of change or setting differs.

    Then all small ones are. Digests of large files are kept one by one: another file among them, other settings or an
    interruption leave them known. Raises OSError naming a file that can't be read.
    """
    stats = [(str(path.resolve()), path.stat()) for path in files]
    seen = json.dumps([settings, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]])

    def digest() -> str:
        size = sum(stat.st_size for _, stat in stats)
        with byte_progress(f"hashing {gigabytes(size)} in {counted(len(stats), 'file')}", size) as count:
            contents = [settings, *(_file_digest(Path(path), stat, memo, count) for path, stat in stats)]
        return xxhash.xxh3_128_hexdigest(json.dumps(contents).encode())

    return _cached_digest(memo / xxhash.xxh3_128_hexdigest(seen.encode()), digest)


def _file_digest(path: Path, stat: os.stat_result, memo: Path, count: CountBytes) -> str:
    """Digest a file's contents, or find the digest of a large one in `memo`."""
    if stat.st_size < LARGE:
        return digest_file(path, count)
    seen = json.dumps([str(path), stat.st_size, stat.st_mtime_ns])
    place = memo / "files" / xxhash.xxh3_128_hexdigest(seen.encode())
    value = _kept_digest(place)
    if value:
        count(stat.st_size)
    else:
        value = digest_file(path, count)
        _keep_digest(place, value)
    return value


def _cached_digest(path: Path, compute: Callable[[], str]) -> str:
    """Read a digest from a small file; compute and write it if it is missing, or empty after a crash of the machine.

    Of processes that miss it together one computes, and the others wait.
    """
    if kept := _kept_digest(path):
        return kept
    with locked(path, "hashes the data"):
        if kept := _kept_digest(path):
            return kept
        value = compute()
        _keep_digest(path, value)
        return value


def _keep_digest(path: Path, value: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(value)
    temporary.replace(path)


def _kept_digest(path: Path) -> str:
    """Return the digest that a file keeps; "" for none."""
    kept = path.read_text() if path.exists() else ""
    return kept if len(kept) == _DIGITS else ""
