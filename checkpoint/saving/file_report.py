"""A rank's report of the file that it has written, as a few bytes that go up the tree beside those of others."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError
from ..planning.plan import FileLayout
from ..stored_file import StoredFile, segment_starts

_ROW = struct.Struct("<IQIQ16s")
_ROWS, _FAILED = b"=", b"!"  # the first byte of a message: rows follow, or what went wrong


@dataclass(frozen=True)
class FileReport:
    """One rank's file or segment: its length, that of its header, the byte at which it begins, its digest in hexadecimal."""

    rank: int
    bytes: int
    header: int
    start: int
    digest: str

    @staticmethod
    def of(rank: int, layout: FileLayout, digest: str) -> bytes:
        """Encode the report on a file of this layout; a rank without a file has nothing to say."""
        if not layout.bytes:
            return _ROWS
        start = 0 if layout.segment is None else layout.segment.start
        return _ROWS + _ROW.pack(rank, layout.bytes, len(layout.header), start, bytes.fromhex(digest))

    @classmethod
    def read_all(cls, message: bytes) -> list[FileReport]:
        """Decode the reports of many ranks, in their order."""
        rows = _ROW.iter_unpack(message[1:])
        return [cls(rank, size, header, start, digest.hex()) for rank, size, header, start, digest in rows]

    def file(self, suffix: str) -> StoredFile:
        """The manifest's entry for a file of its own."""
        return StoredFile.of_rank(self.rank, self.bytes, self.header, self.digest, suffix)


def segments_of(reports: Sequence[FileReport], hosts: Mapping[int, int]) -> list[StoredFile]:
    """Make the manifest's entries for segments. hosts: of each rank the first one on its host

    Raises CheckpointError if one was not written where the one before it ends: each rank has found that out for itself.
    """
    of_host: dict[int, list[FileReport]] = {}
    for report in reports:
        of_host.setdefault(hosts[report.rank], []).append(report)
    for own in of_host.values():
        for report, start in zip(own, segment_starts([each.bytes for each in own]), strict=True):
            if report.start != start:
                raise CheckpointError(
                    f"rank {report.rank} wrote at byte {report.start} of its host's file, not at byte {start}"
                )
    return [StoredFile.segment(r.rank, r.bytes, r.header, r.digest, hosts[r.rank], r.start) for r in reports]


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
