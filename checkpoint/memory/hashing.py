"""Digests of a version in memory, by several processes. No torch: the keeper uses it."""

from __future__ import annotations

import mmap
import os
import warnings

from ..digest import DIGEST_BYTES, LEAF_BYTES, leaf_digests

SHARE_BYTES = 256 * 1024 * 1024  # the least that is worth a process of its own


def leaf_digests_by_many(data: memoryview, workers: int) -> bytes:
    """Digests of the leaves of `data`, joined, by so many forked processes: hashing small pieces holds the interpreter's lock.

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
