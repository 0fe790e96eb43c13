"""Lengths of documents, counted by hand."""

from __future__ import annotations

from meshloom.data.documents.lengths import LengthClass, describe_lengths, length_histogram, token_median


def test_documents_are_counted_by_powers_of_two() -> None:
    assert length_histogram([3, 4, 5, 8, 17]) == [
        LengthClass(4, 2, 7), LengthClass(8, 2, 13), LengthClass(16, 0, 0), LengthClass(32, 1, 17),
    ]  # fmt: skip
    assert length_histogram([1, 1]) == [LengthClass(1, 2, 2)] and length_histogram([]) == []


def test_half_of_the_tokens_lie_in_documents_as_long() -> None:
    assert token_median([1] * 10 + [10]) in (1, 10)
    assert token_median([1] * 9 + [10]) == 10 and token_median([1] * 11 + [10]) == 1
    assert describe_lengths([2, 4, 6, 1000]) == (
        "4 documents of 1,012 tokens: the median has 5, half of all tokens lie in documents of 1,000 or more,"
        " and the longest has 1,000"
    )
