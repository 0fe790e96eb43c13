"""Files of text are read in pieces: the documents are those of the whole text, and memory holds one of them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshloom.data.documents.sources import TextFiles, split_pieces


@given(st.lists(st.text("ab-", max_size=6), max_size=8), st.sampled_from(["-", "--", "-a-", "aa"]))
def test_a_text_in_pieces_is_split_as_a_whole(pieces: list[str], separator: str) -> None:
    assert list(split_pieces(pieces, separator)) == "".join(pieces).split(separator)
    assert list(split_pieces(pieces, None)) == ["".join(pieces)]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
def test_a_block_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("meshloom.data.documents.formats._BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffFüße 😀\r\n\r\n\ufeffzwei\rdrei\r\n\r\n".encode())
    assert list(TextFiles(str(path), "\r\n\r\n").documents()) == ["Füße 😀", "\ufeffzwei\rdrei"]
    assert list(TextFiles(str(path), "\n\n", version=1).documents()) == ["\ufeffFüße 😀", "\ufeffzwei\ndrei"]
    for content, place in ((b"\xef\xbb\xbfabc\xff", 6), ("abcdü".encode()[:-1], 4), (b"ab\xf0\x9f\x98", 2)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.txt: not UTF-8 text .* at byte {place}\) \(data\.input\); convert it"):
            list(TextFiles(str(path)).documents())


def test_a_large_file_with_a_separator_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(("x" * 998 + "\n\n") * 20_000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in TextFiles(str(path), "\n\n").documents())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000 and peak < 8e6, f"{peak / 1e6:.0f} MB for a file of 20 MB"
