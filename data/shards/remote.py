"""Token shards on an object store: copied once into the cache, and read from there."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...config.cache import build_once
from ...config.words import counted
from ..byte_progress import CountBytes, byte_progress, gigabytes
from .manifest import MANIFEST, FileEntry, ShardError, ShardManifest, digest_file

_THREADS = 8  # files that are copied at once


def is_remote(path: str) -> bool:
    """Return whether a path is an fsspec URL (s3://, gs://, …) and no place on a mounted file system."""
    return "://" in path and not path.startswith("file://")


class RemoteShards:
    """A folder of token shards under an fsspec URL. Raises ShardError, which names the URL, for what can't be read."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def exists(self) -> bool:
        """Return whether there are shards."""
        system, root = self._open()
        try:
            return bool(system.exists(f"{root}/{MANIFEST}"))
        except Exception as error:  # a store's library raises anything
            raise self._fault(MANIFEST, error) from error

    def fetch(self, cache: Path) -> Path:
        """Copy the shards into the cache, if they are not there, and return the local folder. Every digest is compared.

        The folder has the name of the shards' fingerprint. So shards that changed on the store are copied again. Files
        that were copied before an interruption are kept for the next attempt.
        """
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as place:
            self._copy(MANIFEST, Path(place))
            try:
                manifest = ShardManifest.read(Path(place))
            except ShardError as error:
                raise ShardError(str(error).replace(place, self.url)) from error
        target = cache / "fetched" / f"shards-{manifest.fingerprint[:16]}"
        build_once(target, lambda folder: self._fetch_into(folder, manifest, target.with_name(f".{target.name}.partial")))
        return target

    def _fetch_into(self, folder: Path, manifest: ShardManifest, partial: Path) -> None:
        """Copy all files, by way of a folder that outlives an interruption."""
        held = [entry for shard in manifest.shards for entry in (shard.tokens, shard.documents, shard.learned)]
        entries = [entry for entry in (*held, manifest.tokenizer) if entry is not None]
        partial.mkdir(exist_ok=True)
        before = sum(entry.bytes for entry in entries if (partial / entry.name).exists())
        with byte_progress(f"comparing {gigabytes(before)} that were copied before", before) as count:
            left = [entry for entry in entries if not _is_whole(partial / entry.name, entry, count)]
        size, free = sum(entry.bytes for entry in left), shutil.disk_usage(partial).free
        if size > free:
            message = f"{self.url}: {gigabytes(size)} do not fit into {partial.parent}, which has {gigabytes(free)} free"
            raise ShardError(f"{message}; free some, or set data.cache_dir to a folder on a larger disk")
        title = f"copying {counted(len(left), 'file')} ({gigabytes(size)}) from {self.url}"
        with byte_progress(title, size, announce=True) as count, ThreadPoolExecutor(_THREADS) as threads:
            copies = [threads.submit(self._copy_whole, entry, partial, count) for entry in left]
            try:
                for copy in copies:
                    copy.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)  # leaving waits for those that have begun
                raise
        for entry in entries:
            (partial / entry.name).rename(folder / entry.name)
        manifest.write(folder)
        shutil.rmtree(partial)

    def _copy_whole(self, entry: FileEntry, folder: Path, count: CountBytes) -> None:
        """Copy a file, which has its name once its digest is the manifest's."""
        unchecked = f"{entry.name}.unchecked"
        self._copy(entry.name, folder, unchecked, count)
        if not _is_whole(folder / unchecked, entry):
            (folder / unchecked).unlink()
            raise ShardError(f"{self.url}/{entry.name}: damaged (it is not what {MANIFEST} lists); upload the data set again")
        with (folder / unchecked).open("rb") as file:
            os.fsync(file.fileno())  # the folder that it moves into counts as complete once it is renamed
        (folder / unchecked).rename(folder / entry.name)

    def _copy(self, name: str, folder: Path, to: str | None = None, count: CountBytes | None = None) -> None:
        from fsspec.callbacks import Callback

        done = 0

        def told(size: int, value: int, **_: object) -> None:
            nonlocal done
            if count is not None and value > done:  # a store that tries again counts from 0
                count(value - done)
                done = value

        system, root = self._open()
        try:
            system.get_file(f"{root}/{name}", str(folder / (to or name)), callback=Callback(hooks={"count": told}))
        except FileNotFoundError:
            raise ShardError(f"{self.url}/{name}: not found; give the URL of an output of 'meshloom data tokenize'") from None
        except Exception as error:
            raise self._fault(name, error) from error

    def _open(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            system, root = url_to_fs(self.url)
        except Exception as error:  # an unknown protocol, a library that is not installed, no credentials
            raise self._fault("", error) from error
        return system, str(root).rstrip("/")

    def _fault(self, name: str, error: Exception) -> ShardError:
        return ShardError(f"{self.url}{'/' if name else ''}{name}: can't be read ({type(error).__name__}: {error})")


def _is_whole(path: Path, entry: FileEntry, count: CountBytes | None = None) -> bool:
    """Return whether a file is there, with the contents that the manifest lists. count: told the bytes that were read"""
    return path.is_file() and path.stat().st_size == entry.bytes and digest_file(path, count) == entry.xxh3
