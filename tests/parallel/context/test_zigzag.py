"""Packed rows as they are dealt to the members of a ring: positions, balance, and what stays whole."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.parallel.context.zigzag import Piece, deal_pieces


def bounds(*lengths: int) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def entries(pieces: tuple[Piece, ...], cu_seqlens: tuple[int, ...]) -> int:
    """Count score entries: a position attends to those before it in its document, and to itself."""
    return sum(at - cu_seqlens[p.document] + 1 for p in pieces for at in range(p.start, p.start + p.length))


@st.composite
def rows(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """(bounds of documents in rows laid end to end, length of a row, members)."""
    size = draw(st.integers(1, 5))
    length = 2 * size * draw(st.integers(1, 12))
    count = draw(st.integers(1, 3))
    inner = draw(st.sets(st.integers(0, count * length), max_size=20))
    return tuple(sorted(inner | set(range(0, count * length + 1, length)))), length, size


@given(rows())
@settings(deadline=None, max_examples=200)
def test_members_hold_as_many_positions_of_each_row(case: tuple[tuple[int, ...], int, int]) -> None:
    cu_seqlens, length, size = case
    for pieces in deal_pieces(cu_seqlens, length, size):
        assert list(pieces) == sorted(pieces)
        for start in range(0, cu_seqlens[-1], length):
            inside = [piece for piece in pieces if start <= piece.start < start + length]
            assert sum(piece.length for piece in inside) == length // size


LONG_AND_SHORT = (23_000, 300, 17_001, 41, 14_000, 11_194)  # a row of 65,536


@pytest.mark.parametrize("size", [2, 4, 8])
def test_each_member_computes_as_many_entries(size: int) -> None:
    cu_seqlens, length = bounds(*LONG_AND_SHORT), sum(LONG_AND_SHORT)
    found = [entries(pieces, cu_seqlens) for pieces in deal_pieces(cu_seqlens, length, size)]
    assert max(found) * size / sum(found) < 1.01
    parts = [(part * length // (2 * size), (part + 1) * length // (2 * size)) for part in range(2 * size)]
    of_position = [n for document in LONG_AND_SHORT for n in range(1, document + 1)]
    row_zigzag = [sum(sum(of_position[slice(*parts[part])]) for part in (m, 2 * size - 1 - m)) for m in range(size)]
    assert max(row_zigzag) * size / sum(row_zigzag) > 1.05  # what a zig-zag of the whole row would leave


def test_documents_that_balance_whole_are_not_cut() -> None:
    dealt = deal_pieces(bounds(500, 300, 500, 200, 300, 200), 2000, 2)
    assert [[piece.document for piece in pieces] for pieces in dealt] == [[0, 1, 3], [2, 4, 5]]
    assert all(piece.length in (500, 300, 200) for pieces in dealt for piece in pieces)


def test_a_document_that_fits_nowhere_whole_fills_the_room() -> None:
    """Three documents on two members: the third is cut in two, once."""
    dealt = deal_pieces(bounds(400, 400, 400), 1200, 2)
    assert [[piece[1:] for piece in pieces] for pieces in dealt] == [[(0, 400), (800, 200)], [(400, 400), (1000, 200)]]


def test_documents_are_cut_where_whole_ones_would_not_balance() -> None:
    """Three long documents on two members: whole, the late half of the third would make one member a sixth slower."""
    cu_seqlens = bounds(51_200, 51_200, 51_200)
    first, second = (entries(pieces, cu_seqlens) for pieces in deal_pieces(cu_seqlens, 153_600, 2))
    assert first == second


def test_a_row_of_one_document_is_the_plain_zigzag() -> None:
    dealt = deal_pieces((0, 16), 16, 4)
    assert [[piece.start for piece in pieces] for pieces in dealt] == [[0, 14], [2, 12], [4, 10], [6, 8]]
