"""A rank's report of the file that it has written, as a few bytes that go up the tree beside those of others."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ..manifest import StoredFile, data_file_names
from ..planning.plan import FileLayout

_ROW = struct.Struct("<IQI16s")
_ROWS, _FAILED = b"=", b"!"  # the first byte of a message: rows follow, or what went wrong


@dataclass(frozen=True)
class FileReport:
    """One rank's file: its length, that of its header, and its digest in hexadecimal."""

    rank: int
    bytes: int
    header: int
    digest: str

    @staticmethod
    def of(rank: int, layout: FileLayout, digest: str) -> bytes:
        """Encode the report on a file of this layout; a rank without a file has nothing to say."""
        row = _ROW.pack(rank, layout.bytes, len(layout.header), bytes.fromhex(digest)) if layout.bytes else b""
        return _ROWS + row

    @classmethod
    def read_all(cls, message: bytes) -> list[FileReport]:
        """Decode the reports of many ranks, in their order."""
        return [cls(rank, size, header, digest.hex()) for rank, size, header, digest in _ROW.iter_unpack(message[1:])]

    def file(self, suffix: str) -> StoredFile:
        """The manifest's entry."""
        name, leaves = data_file_names(self.rank, suffix)
        return StoredFile(name, self.bytes, leaves, self.digest, self.rank, self.header)


def failure(reason: str) -> bytes:
    """Encode that a rank has no file to report."""
    return _FAILED + reason.encode()


def failure_in(message: bytes) -> str | None:
    """Return why some rank failed; None if none did."""
    return message[1:].decode() if message[:1] == _FAILED else None


def join_reports(messages: Sequence[bytes]) -> bytes:
    """Join the reports of runs of ranks; of failures the first is what counts."""
    failed = next((message for message in messages if failure_in(message) is not None), None)
    return _ROWS + b"".join(message[1:] for message in messages) if failed is None else failed
