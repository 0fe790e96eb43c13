"""Several processes hash a version as one does."""

from __future__ import annotations

import mmap
import random

import pytest

from meshloom.checkpoint.digest import leaf_digests
from meshloom.checkpoint.memory import hashing


def test_many_processes_hash_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "SHARE_BYTES", 4096)
    with mmap.mmap(-1, 100_000) as memory:
        memory[:] = random.Random(1).randbytes(100_000)
        with memoryview(memory) as view:
            for size in (0, 1, 4096, 8192, 20_000, 99_999, 100_000):
                for workers in (0, 1, 2, 3, 7):
                    assert hashing.leaf_digests_by_many(view[:size], workers) == leaf_digests(view[:size])
