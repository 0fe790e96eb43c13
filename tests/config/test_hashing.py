"""The keyed hash, against SplitMix64's published outputs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from meshloom.config.hashing import hash64, mix64, mix64_array, splitmix64, stream64

# Vigna's reference implementation, seeds 1234567 and 0.
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def test_hash_matches_published_splitmix64() -> None:
    assert stream64(1234567, 5).tolist() == PUBLISHED
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert hash64(1234567) == PUBLISHED[0]


def test_hash_depends_on_order_and_every_word() -> None:
    assert len({hash64(1, 2), hash64(2, 1), hash64(1), hash64(1, 2, 0), hash64(1, 3)}) == 5
    assert hash64(-1) == hash64((1 << 64) - 1)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_vector_hash_equals_scalar_hash(words: list[int]) -> None:
    assert mix64_array(np.array(words, np.uint64)).tolist() == [mix64(word) for word in words]
