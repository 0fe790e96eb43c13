"""A table of layouts that a test file holds to the one-process run, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from support.parity import Difference, Work, differences


class ParityTable:
    """Rows of a table. Those on the same number of processes share them: starting processes is what takes the time.

    rows     name → number of processes, and the work
    timeout  seconds for all rows on one number of processes
    """

    def __init__(self, rows: Mapping[str, tuple[int, Work]], timeout: float = 150.0) -> None:
        self._rows, self._timeout = rows, timeout
        self._found: dict[int, dict[str, Difference] | AssertionError] = {}

    def names(self) -> list[Any]:
        """Return the names as parameters of a test; the ids tell the number of processes."""
        return [pytest.param(name, id=f"p{ranks}: {name}") for name, (ranks, _) in self._rows.items()]

    def difference(self, name: str) -> Difference:
        """Return how far a row's run is from the oracle. Raises what one of its processes failed with."""
        ranks, _ = self._rows[name]
        if ranks not in self._found:
            self._found[ranks] = self._run(ranks)
        found = self._found[ranks]
        if isinstance(found, AssertionError):
            raise found
        return found[name]

    def _run(self, ranks: int) -> dict[str, Difference] | AssertionError:
        works = {name: work for name, (size, work) in self._rows.items() if size == ranks}
        try:
            return dict(zip(works, differences(ranks, list(works.values()), timeout=self._timeout), strict=True))
        except AssertionError as failure:
            return failure
