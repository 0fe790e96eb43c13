"""A rank's report of the file that it has written, as a few bytes that go up the tree beside those of others."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError
from ..planning.plan import FileLayout
from ..stored_file import StoredFile, host_file_name, segment_starts
from ..writing.image import Written

_ROW, _SEGMENT = struct.Struct("<IQI16s"), struct.Struct("<IQI16sQ?")
_ROWS, _FAILED = b"=", b"!"  # the first byte of a message: rows follow, or what went wrong


@dataclass(frozen=True)
class FileReport:
    """One rank's file or segment: its length, that of its header, its digest in hexadecimal.

    start    byte of the host's file from which a segment was written on
    created  its writer has created that file
    """

    rank: int
    bytes: int
    header: int
    digest: str
    start: int = 0
    created: bool = True

    @staticmethod
    def of(rank: int, layout: FileLayout, digest: str) -> bytes:
        """Encode the report on a file of this layout; a rank without a file has nothing to say."""
        return _ROWS + _ROW.pack(rank, layout.bytes, len(layout.header), bytes.fromhex(digest)) if layout.bytes else _ROWS

    @staticmethod
    def of_segment(rank: int, layout: FileLayout, written: Written) -> bytes:
        """Encode the report on a segment, with what its writer has told of the host's file."""
        own = rank, layout.bytes, len(layout.header), bytes.fromhex(written.digest)
        return _ROWS + _SEGMENT.pack(*own, written.start, written.created)

    @classmethod
    def read_all(cls, message: bytes, *, segments: bool = False) -> list[FileReport]:
        """Decode the reports of many ranks, in their order. segments: they are reports on segments"""
        rows = (_SEGMENT if segments else _ROW).iter_unpack(message[1:])
        return [cls(rank, size, header, digest.hex(), *place) for rank, size, header, digest, *place in rows]

    def file(self, suffix: str) -> StoredFile:
        """The manifest's entry for a file of its own."""
        return StoredFile.of_rank(self.rank, self.bytes, self.header, self.digest, suffix)


def segments_of(reports: Sequence[FileReport], hosts: Mapping[int, int]) -> list[StoredFile]:
    """Make the manifest's entries for segments. hosts: of each rank the first one on its host

    Raises CheckpointError if one was not written where the one before it ends: each rank has found that out for itself.
    Also where two ranks have created the same file: its name had gone in between, and with it what others had written.
    """
    of_host: dict[int, list[FileReport]] = {}
    for report in reports:
        of_host.setdefault(hosts[report.rank], []).append(report)
    for host, own in of_host.items():
        for report, start in zip(own, segment_starts([each.bytes for each in own]), strict=True):
            if report.start != start:
                where = f"wrote at byte {report.start} of {host_file_name(host)}, not at byte {start}"
                raise CheckpointError(f"rank {report.rank}: {where}")
        creators = [report.rank for report in own if report.created]
        if len(creators) > 1:
            what = (
                f"{host_file_name(host)} was gone, which rank {creators[0]} had created and written to: who deletes files here?"
            )
            raise CheckpointError(f"rank {creators[1]}: {what}")
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
