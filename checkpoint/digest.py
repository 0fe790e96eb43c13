"""Digests of a file, in three layers, so that a part can be checked without reading the whole.

A *leaf* is 4 KiB of the file (the last one may be shorter) and has an xxh3-128 digest of its bytes. A *block* is 4,096
leaves (16 MiB) and its digest is the xxh3-128 of its leaves' digests, one after the other. Both lie beside the data in a
file of their own, the leaves' first. A *file* has the xxh3-128 of its blocks' digests, one after the other. The manifest
carries the files' digests, so that whatever is read is proved by it.
"""

from __future__ import annotations

import mmap
import os
import warnings

import xxhash

LEAF_BYTES = 4 * 1024
BLOCK_BYTES = 16 * 1024 * 1024
DIGEST_BYTES = 16
SHARE_BYTES = 256 * 1024 * 1024  # the least that is worth a process of its own
HASH_NAME = "xxh3-128"


def leaf_digests(data: memoryview, leaf_bytes: int = LEAF_BYTES) -> bytes:
    """Digests of the leaves of `data`, which starts at a leaf boundary of its file, joined."""
    digest = xxhash.xxh3_128_digest
    return b"".join([digest(data[at : at + leaf_bytes]) for at in range(0, len(data), leaf_bytes)])


def leaf_digests_by_many(data: memoryview, workers: int) -> bytes:
    """The same, by so many processes forked for it: hashing small pieces holds the interpreter's lock.

    `data` must be shared memory, of which nothing is copied. For a process without torch; raises OSError if a child dies.
    """
    workers = min(workers, len(data) // SHARE_BYTES)
    if workers < 2:
        return leaf_digests(data)
    step = -(-len(data) // workers // LEAF_BYTES) * LEAF_BYTES
    children: list[int] = []
    with mmap.mmap(-1, -(-len(data) // LEAF_BYTES) * DIGEST_BYTES) as digests:
        for start in range(0, len(data), step):
            with warnings.catch_warnings():  # Python ≥ 3.12 warns of forks beside threads; this child hashes, and ends
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                try:
                    part = leaf_digests(data[start : start + step])
                    at = start // LEAF_BYTES * DIGEST_BYTES
                    digests[at : at + len(part)] = part
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        if any(codes):
            raise OSError(f"a process that hashes a snapshot ended with status {max(codes)}")
        return digests[:]


def block_digests(leaves: bytes, leaf_bytes: int = LEAF_BYTES, block_bytes: int = BLOCK_BYTES) -> bytes:
    """Digests of the blocks of a file whose leaves have these digests, joined."""
    span = block_bytes // leaf_bytes * DIGEST_BYTES
    return b"".join([xxhash.xxh3_128_digest(leaves[at : at + span]) for at in range(0, len(leaves), span)])


def seal(leaves: bytes) -> tuple[bytes, str]:
    """Return the content of the file beside a data file whose leaves have these digests, and that one's digest."""
    blocks = block_digests(leaves)
    return leaves + blocks, text_digest(blocks)


def text_digest(data: bytes) -> str:
    """Hexadecimal digest of a small text, such as the manifest."""
    return xxhash.xxh3_128_hexdigest(data)
