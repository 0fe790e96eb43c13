"""Data files of a step: a file of each rank with its digests beside it, or a file of each host with segments of its ranks.

A segment is, byte for byte, what would be the rank's own file, with its digests behind it and zeros up to the next page. So
ranks of a host write one file without waiting for each other: where a segment begins follows from the sizes of those before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .digest import BLOCK_BYTES, DIGEST_BYTES, LEAF_BYTES

NO_HOST = -1


@dataclass
class StoredFile:
    """One rank's data: their length, where their leaves' digests are, and what proves these.

    name    of the file; leaves: of the one with the digests: the same for a segment, empty for another program's file
    digest  of the digests of its blocks, which lie behind the leaves'
    rank    that wrote it; header: bytes before its first value
    blocks  the digests of its blocks themselves, which the manifest had up to format version 3
    host    number of the host in whose file it is a segment; NO_HOST: it is a file of its own
    start   byte of the file at which it begins
    """

    name: str
    bytes: int
    leaves: str
    digest: str = ""
    rank: int = -1
    header: int = 0
    blocks: bytes = b""
    host: int = NO_HOST
    start: int = 0

    @classmethod
    def of_rank(cls, rank: int, size: int, header: int, digest: str, suffix: str = "") -> StoredFile:
        """A file of a rank's own."""
        name, leaves = data_file_names(rank, suffix)
        return cls(name, size, leaves, digest, rank, header)

    @classmethod
    def segment(cls, rank: int, size: int, header: int, digest: str, host: int, start: int) -> StoredFile:
        """A rank's segment of the file of its host."""
        name = host_file_name(host)
        return cls(name, size, name, digest, rank, header, host=host, start=start)

    @property
    def is_segment(self) -> bool:
        """Return whether it is part of a host's file."""
        return self.host != NO_HOST

    @property
    def has_digests(self) -> bool:
        """True if what is read of it can be checked."""
        return bool(self.leaves)

    @property
    def digests_start(self) -> int:
        """Byte at which its leaves' digests begin, in the file that has them."""
        return self.start + self.bytes if self.is_segment else 0

    @property
    def title(self) -> str:
        """Its name for messages."""
        return f"{self.name}, segment of rank {self.rank}" if self.is_segment else self.name

    @property
    def leaves_title(self) -> str:
        """The name of its digests for messages."""
        return f"{self.name}, digests of rank {self.rank}" if self.is_segment else self.leaves


def data_file_names(rank: int, suffix: str = "") -> tuple[str, str]:
    """Names of a rank's data file and of its leaves' digests."""
    return f"rank-{rank:05d}{suffix}.safetensors", f"rank-{rank:05d}{suffix}.leaves"


def host_file_name(host: int) -> str:
    """Name of a host's file. host: the first of its ranks"""
    return f"host-{host:05d}.segments"


def digests_bytes(size: int, leaf_bytes: int = LEAF_BYTES, block_bytes: int = BLOCK_BYTES) -> int:
    """Length of the digests of so many bytes: of their leaves, and of their blocks."""
    return (-(-size // leaf_bytes) - (-size // block_bytes)) * DIGEST_BYTES


def segment_end(start: int, size: int, leaf_bytes: int = LEAF_BYTES, block_bytes: int = BLOCK_BYTES) -> int:
    """Byte at which the next segment begins, after one of so many bytes of data."""
    return -(-(start + size + digests_bytes(size, leaf_bytes, block_bytes)) // leaf_bytes) * leaf_bytes


def segment_starts(sizes: Iterable[int]) -> list[int]:
    """Bytes at which the segments of a host begin. sizes: of their data, in the ranks' order; 0: there is none"""
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at = segment_end(at, size)
    return starts


def misplaced_segment(files: Sequence[StoredFile], leaf_bytes: int, block_bytes: int) -> StoredFile | None:
    """Return a segment that does not begin where the one before it in its file ends; None: all do."""
    ends: dict[str, int] = {}
    for file in files:
        if file.is_segment:
            if file.start != ends.get(file.name, 0):
                return file
            ends[file.name] = segment_end(file.start, file.bytes, leaf_bytes, block_bytes)
    return None
