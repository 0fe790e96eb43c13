"""One checkpoint folder as a set of named files: on a local file system, or on any that fsspec knows (s3://, gs://, memory://)."""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Generator
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from ..config.names import leads_outside
from .errors import CheckpointError, DamageError, UnreadableError

T = TypeVar("T")

log = logging.getLogger(__name__)

RETRY_PAUSES = (0.5, 1.0, 2.0)
"""Seconds before reading is tried again, where it has failed for a reason that may pass."""
_ABSENT = (FileNotFoundError, NotADirectoryError)
# A name that leads to no file, and what a file system says that has itself found its data not to be what was written.
_DAMAGED = (errno.ELOOP, errno.EBADMSG, errno.EUCLEAN)

# fsspec's listings are dicts of its own, whose `pop` fails if two threads forget one at once.
_LISTINGS = threading.Lock()


_GIVEN_UP: ContextVar[list[str] | None] = ContextVar("given_up", default=None)


@contextlib.contextmanager
def retrying_once() -> Generator[None]:
    """Once a file can't be read for all tries, try each other one only once in here.

    For reads of many files, such as a listing of steps: where many fail, it would wait for each.
    """
    if _GIVEN_UP.get() is not None:
        yield
        return
    token = _GIVEN_UP.set([])
    try:
        yield
    finally:
        _GIVEN_UP.reset(token)


def _read_with_retries(label: str, doing: str, action: Callable[[], T]) -> T:
    """Return what reading gives. What may pass (a time-out, an I/O error) is tried again after each of RETRY_PAUSES.

    label: of the file, for messages; doing: what the action does to it

    Raises FileNotFoundError or NotADirectoryError if it is not there, DamageError if it can't be what was written, and
    UnreadableError if nothing can be said of it.
    """
    given_up = _GIVEN_UP.get()
    for tries, pause in enumerate((*(() if given_up else RETRY_PAUSES), None)):
        try:
            return action()
        except _ABSENT:
            raise
        except OSError as error:
            what = f"{doing} failed: {error}"
            # By class too: libraries of object stores raise these without a number.
            if isinstance(error, IsADirectoryError) or error.errno in _DAMAGED:
                raise DamageError(label, what) from error
            if pause is None and given_up is not None:
                given_up.append(label)
            if isinstance(error, PermissionError) or pause is None:
                raise UnreadableError(label, what) from error
            if tries == 0:
                log.warning("%s: %s; it is tried again for %g s", label, what, sum(RETRY_PAUSES))
            time.sleep(pause)
    raise AssertionError


def _ends_before(label: str, end: int, stop: int) -> DamageError:
    return DamageError(label, f"the file ends at byte {end}, before byte {stop}")


class Files(Protocol):
    """The operations on a folder that reading, listing and committing need. Each kind of folder has the underscored ones.

    parallel_reads  so many ranges are worth reading at once, in threads; 1: its readers are for one thread
    merge_gap       bytes between two ranges that cost less to read than a second request; 0: requests cost next to nothing
    """

    parallel_reads: int = 1
    merge_gap: int = 0

    def label(self, name: str = "") -> str:
        """Return the name of the file, or of the folder itself, for messages."""
        ...

    def child(self, name: str) -> Files:
        """A folder inside."""
        ...

    def reader(self, name: str) -> contextlib.AbstractContextManager[RangeReader]:
        """Open a file for reading ranges. Raises DamageError if it is missing, UnreadableError if it can't be read."""
        ...

    def _names(self) -> list[str]: ...

    def _size(self, name: str) -> int: ...

    def _sizes(self) -> dict[str, int]: ...

    def _read(self, name: str) -> bytes: ...

    def names(self) -> list[str]:
        """Names of the files and folders directly inside; empty if the folder does not exist.

        Raises DamageError if it is no folder that can be listed, UnreadableError if that can't be told.
        """
        try:
            return sorted(_read_with_retries(self.label(), "listing it", self._names))
        except _ABSENT:
            return []

    def size(self, name: str) -> int | None:
        """Length of a file in bytes; None if there is none.

        Raises DamageError if its name leads to no file, UnreadableError if that can't be told.
        """
        try:
            return _read_with_retries(self.label(name), "asking for its length", lambda: self._size(name))
        except _ABSENT:
            return None

    def sizes(self) -> dict[str, int]:
        """Lengths in bytes of all files directly inside, by one listing; empty if the folder does not exist.

        Raises DamageError if it is no folder that can be listed, UnreadableError if that can't be told.
        """
        try:
            return _read_with_retries(self.label(), "asking for the lengths of its files", self._sizes)
        except _ABSENT:
            return {}

    def read(self, name: str) -> bytes:
        """A whole small file. Raises FileNotFoundError, DamageError if it is no file, UnreadableError if it can't be read."""
        try:
            return _read_with_retries(self.label(name), "reading it", lambda: self._read(name))
        except _ABSENT:
            raise FileNotFoundError(self.label(name)) from None


class RangeReader(Protocol):
    """An open file."""

    def expect(self, offset: int, length: int) -> None:
        """These bytes will be asked for soon, among others: where that helps, begin to fetch them."""
        ...

    def fill(self, target: memoryview, offset: int) -> None:
        """Read exactly `len(target)` bytes. Raises DamageError if the file ends before, UnreadableError if it can't be read."""
        ...


class LocalFiles(Files):
    """A folder of a mounted file system."""

    parallel_reads = 4  # one alone leaves a disk idle while the kernel copies

    def __init__(self, path: Path) -> None:
        self.path = path

    def label(self, name: str = "") -> str:
        """See Files."""
        return str(self.path / name)

    def child(self, name: str) -> LocalFiles:
        """See Files."""
        return LocalFiles(self.path / name)

    def _names(self) -> list[str]:
        return [entry.name for entry in self.path.iterdir()]

    def _size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def _sizes(self) -> dict[str, int]:
        with os.scandir(self.path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def _read(self, name: str) -> bytes:
        self._refuse_outside(name)
        return (self.path / name).read_bytes()

    @contextlib.contextmanager
    def reader(self, name: str) -> Generator[RangeReader]:
        """See Files."""
        self._refuse_outside(name)
        opened = _LocalReader(self.path / name)
        try:
            yield opened
        finally:
            opened.close()

    def _refuse_outside(self, name: str) -> None:
        if leads_outside(self.path, name):
            there = (self.path / name).resolve()
            raise DamageError(self.label(name), f"it is a link to {there}, outside of the folder; put the file itself here")


class _LocalReader:
    def __init__(self, path: Path) -> None:
        self._path, self._label = path, str(path)
        self._descriptor = self._open()

    def _open(self) -> int:
        try:
            descriptor = _read_with_retries(self._label, "opening it", lambda: os.open(self._path, os.O_RDONLY))
        except _ABSENT:
            raise DamageError(self._label, "the file is missing") from None
        with contextlib.suppress(OSError):
            # Only what is asked for: the kernel's read-ahead would fetch the neighbours of every small range.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def expect(self, offset: int, length: int) -> None:
        """See RangeReader."""
        with contextlib.suppress(OSError):  # some file systems know no such advice
            os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def fill(self, target: memoryview, offset: int) -> None:
        """See RangeReader."""
        done = 0
        while done < len(target):
            count = self._read(target[done:], offset + done)
            if count == 0:
                raise _ends_before(self._label, offset + done, offset + len(target))
            done += count

    def _read(self, target: memoryview, offset: int) -> int:
        def read() -> int:
            try:
                return os.preadv(self._descriptor, [target], offset)
            except OSError as error:
                if error.errno == errno.ESTALE:  # a file server has put another copy in the place of this one
                    fresh = self._open()
                    self.close()
                    self._descriptor = fresh
                raise

        return _read_with_retries(self._label, f"reading at byte {offset}", read)


@contextlib.contextmanager
def _as_os_errors() -> Generator[None]:
    """Raise errors of an object store's own library (missing credentials, say) as OSError, as file systems do."""
    try:
        yield
    except (OSError, MemoryError):  # want of memory says nothing about the store
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class RemoteFiles(Files):
    """A folder of a file system that fsspec gives access to. There are no renames: a checkpoint's manifest comes last."""

    def __init__(self, system: Any, path: str) -> None:
        self.system = system
        self.path = path
        # A library that is not made of coroutines may keep one connection, for one thread; a cache (`simplecache::`) may give
        # one thread the half of a file that another fetches. Caches speak for the system inside, so their class is asked.
        systems = (system, getattr(system, "fs", system))
        self.parallel_reads = 8 if all(getattr(type(each), "async_impl", False) for each in systems) else 1
        self.merge_gap = 64 * 2**10

    def label(self, name: str = "") -> str:
        """See Files."""
        return self.system.unstrip_protocol(self._join(name))

    def child(self, name: str) -> RemoteFiles:
        """See Files."""
        return RemoteFiles(self.system, self._join(name))

    @_as_os_errors()
    def _names(self) -> list[str]:
        self._forget_listing(self.path)
        return [PurePosixPath(found).name for found in self.system.ls(self.path, detail=False)]

    @_as_os_errors()
    def _size(self, name: str) -> int:
        path = self._join(name)
        self._forget_listing(path)  # another rank may have written since a folder was listed here
        return int(self.system.size(path))

    @_as_os_errors()
    def _sizes(self) -> dict[str, int]:
        self._forget_listing(self.path)
        found = self.system.ls(self.path, detail=True)
        return {PurePosixPath(each["name"]).name: int(each["size"]) for each in found if each["type"] == "file"}

    @_as_os_errors()
    def _read(self, name: str) -> bytes:
        return self.system.cat_file(self._join(name))

    @contextlib.contextmanager
    def reader(self, name: str) -> Generator[RangeReader]:
        """See Files."""
        yield _RemoteReader(self, name)

    def fetch(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `[start, stop)` of a file, asked for once.

        Raises DamageError if the file ends before or the store gives more, FileNotFoundError if there is no file, and any
        other OSError as it comes: the reader tries it again, and raises UnreadableError if that is of no use.
        """
        try:
            with _as_os_errors():
                data = self.system.cat_file(self._join(name), start=start, end=stop)
            end = start + len(data)
        except FileNotFoundError:
            raise
        except OSError as error:  # of some stores also where there are no such bytes
            with contextlib.suppress(OSError):
                end = self._size(name)
                if end < stop:
                    raise _ends_before(self.label(name), end, stop) from error
            raise
        if end < stop:
            raise _ends_before(self.label(name), end, stop)
        if end > stop:
            what = f"the store gives {len(data)} bytes for the {stop - start} from byte {start} on"
            raise DamageError(self.label(name), what)
        return data

    def write(self, name: str, data: bytes, *, anew: bool = False) -> bool:
        """Create or replace a file in one step, as object stores do. anew: only if there is none. Returns whether it did.

        Where the store or its library knows no such condition, asking first takes its place.
        """
        path = self._join(name)
        if anew and "mode" in inspect.signature(self.system.pipe_file).parameters:
            try:
                self.system.pipe_file(path, data, mode="create")
                return True
            except Exception as error:  # libraries have errors of their own for what a store does not know
                if isinstance(error, FileExistsError):
                    return False
        if anew and self.size(name) is not None:
            return False
        with _as_os_errors():
            self.system.pipe_file(path, data)
        return True

    @_as_os_errors()
    def make(self) -> None:
        """Make the folder itself, where there are folders and this one is not there."""
        self.system.makedirs(self.path, exist_ok=True)

    def delete(self, name: str) -> None:
        """Delete a file or a folder; silent if there is none."""
        with contextlib.suppress(FileNotFoundError), _as_os_errors():
            self.system.rm(self._join(name), recursive=True)

    def _forget_listing(self, path: str) -> None:
        with _LISTINGS:
            self.system.invalidate_cache(path)

    def _join(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}" if name else self.path


class _RemoteReader:
    def __init__(self, files: RemoteFiles, name: str) -> None:
        self._files, self._name, self._label = files, name, files.label(name)

    def expect(self, offset: int, length: int) -> None:
        """See RangeReader: nothing is fetched twice here."""

    def fill(self, target: memoryview, offset: int) -> None:
        """See RangeReader."""

        def fetch() -> bytes:
            return self._files.fetch(self._name, offset, offset + len(target))

        try:
            target[:] = _read_with_retries(self._label, f"reading at byte {offset}", fetch)
        except _ABSENT:
            raise DamageError(self._label, "the file is missing") from None


HUGGING_FACE = "hf:"
"""Prefix of a location that is a Hugging Face folder, which is read as a checkpoint."""


def hugging_face_folder(location: str | Path) -> Path | None:
    """Return the folder that `hf:<folder>` names; None for any other location."""
    text = str(location)
    return Path(text.removeprefix(HUGGING_FACE)).expanduser() if text.startswith(HUGGING_FACE) else None


def is_remote(location: str | Path) -> bool:
    """Return whether a location is an fsspec URL rather than a path."""
    return isinstance(location, str) and "://" in location and not location.startswith("file://")


def local_path(location: str | Path) -> Path:
    """Return the path that a location on a mounted file system names: itself, or that of a `file://` URL; with ~ expanded."""
    return Path(str(location).removeprefix("file://")).expanduser()


def open_files(location: str | Path) -> LocalFiles | RemoteFiles:
    """The folder at a path or an fsspec URL. Raises CheckpointError for a URL that nothing here can read."""
    if not is_remote(location):
        return LocalFiles(local_path(location))
    import fsspec  # only where it is used: importing it costs a tenth of a second

    try:
        system, path = fsspec.core.url_to_fs(str(location))
    except Exception as error:  # an unknown protocol, a library that is not here, and whatever that raises
        raise CheckpointError(f"{location}: {error}") from error
    return RemoteFiles(system, path)
