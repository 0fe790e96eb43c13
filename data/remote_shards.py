"""Token shards on an object store: copied once into the cache, and read from there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..config.cache import build_once
from .shards import MANIFEST, FileEntry, ShardError, ShardManifest, digest_file

log = logging.getLogger(__name__)


def is_remote(path: str) -> bool:
    """Return whether a path is an fsspec URL (s3://, gs://, …) and no place on a mounted file system."""
    return "://" in path and not path.startswith("file://")


class RemoteShards:
    """A folder of token shards under an fsspec URL. Raises ShardError, which names the URL, for what can't be read."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def child(self, name: str) -> RemoteShards:
        """Return a folder inside."""
        return RemoteShards(f"{self.url}/{name}")

    def exists(self) -> bool:
        """Return whether there are shards."""
        system, root = self._open()
        try:
            return bool(system.exists(f"{root}/{MANIFEST}"))
        except Exception as error:  # a store's library raises anything
            raise self._fault(MANIFEST, error) from error

    def fetch(self, cache: Path) -> Path:
        """Copy the shards into the cache, if they are not there, and return the local folder. Every digest is compared.

        The folder has the name of the shards' fingerprint. So shards that changed on the store are copied again.
        """
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as place:
            self._copy(MANIFEST, Path(place))
            manifest = ShardManifest.read(Path(place))
        target = cache / "fetched" / f"shards-{manifest.fingerprint[:16]}"
        build_once(target, lambda folder: self._fetch_into(folder, manifest))
        return target

    def _fetch_into(self, folder: Path, manifest: ShardManifest) -> None:
        held = [entry for shard in manifest.shards for entry in (shard.tokens, shard.documents, shard.learned)]
        entries = [entry for entry in (*held, manifest.tokenizer) if entry is not None]
        size = sum(entry.bytes for entry in entries)
        log.info("copying %d files (%.2f GB) from %s into the cache", len(entries), size / 1e9, self.url)
        for entry in entries:
            self._copy(entry.name, folder)
            self._compare(folder / entry.name, entry)
        manifest.write(folder)

    def _compare(self, path: Path, entry: FileEntry) -> None:
        if path.stat().st_size != entry.bytes or digest_file(path) != entry.xxh3:
            raise ShardError(f"{self.url}/{entry.name}: damaged (it is not what {MANIFEST} lists); upload the data set again")

    def _copy(self, name: str, folder: Path) -> None:
        system, root = self._open()
        try:
            system.get_file(f"{root}/{name}", str(folder / name))
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
