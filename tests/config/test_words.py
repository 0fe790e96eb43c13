"""Words of messages."""

from __future__ import annotations

import pytest

from meshloom.config.words import first_line


@pytest.mark.parametrize(
    ("message", "line"), [("one\ntwo", "one"), ("\nof a library", "of a library"), ("", "ValueError"), ("\n", "ValueError")]
)
def test_first_line_of_an_error(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line
