"""Digests of a file, in three layers, so that a part can be checked without reading the whole.

A *leaf* is 4 KiB of the file (the last one may be shorter) and has an xxh3-128 digest of its bytes. A *block* is 4,096
leaves (16 MiB) and its digest is the xxh3-128 of its leaves' digests, one after the other. Both lie beside the data in a
file of their own, the leaves' first. A *file* has the xxh3-128 of its blocks' digests, one after the other. The manifest
carries the files' digests, so that whatever is read is proved by it.
"""

from __future__ import annotations

import xxhash

LEAF_BYTES = 4 * 1024
BLOCK_BYTES = 16 * 1024 * 1024
DIGEST_BYTES = 16
HASH_NAME = "xxh3-128"


def leaf_digests(data: memoryview, leaf_bytes: int = LEAF_BYTES) -> bytes:
    """Digests of the leaves of `data`, which starts at a leaf boundary of its file, joined."""
    digest = xxhash.xxh3_128_digest
    return b"".join([digest(data[at : at + leaf_bytes]) for at in range(0, len(data), leaf_bytes)])


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
