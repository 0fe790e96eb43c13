"""Digests of a file, in two layers, so that a part can be checked without reading the whole.

A *leaf* is 4 KiB of the file (the last one may be shorter) and has an xxh3-128 digest of its bytes. A *block* is 4,096
leaves (16 MiB) and its digest is the xxh3-128 of its leaves' digests, one after the other. The manifest carries the
blocks' digests; the leaves' lie beside the data in a file of their own, which proves itself by hashing to the blocks'.
"""

from __future__ import annotations

import xxhash

LEAF_BYTES = 4 * 1024
BLOCK_BYTES = 16 * 1024 * 1024
DIGEST_BYTES = 16
HASH_NAME = "xxh3-128"


def leaf_digests(data: memoryview) -> bytes:
    """Digests of the leaves of `data`, which starts at a leaf boundary of its file, joined."""
    digest = xxhash.xxh3_128_digest
    return b"".join([digest(data[at : at + LEAF_BYTES]) for at in range(0, len(data), LEAF_BYTES)])


def block_digests(leaves: bytes, leaf_bytes: int = LEAF_BYTES, block_bytes: int = BLOCK_BYTES) -> list[str]:
    """Hexadecimal digests of the blocks of a file whose leaves have these digests."""
    span = block_bytes // leaf_bytes * DIGEST_BYTES
    return [xxhash.xxh3_128_hexdigest(leaves[at : at + span]) for at in range(0, len(leaves), span)]


def text_digest(data: bytes) -> str:
    """Hexadecimal digest of a small text, such as the manifest."""
    return xxhash.xxh3_128_hexdigest(data)
