"""Runs of these tests fork the writers of their checkpoints: an interpreter for each rank took a quarter of a run."""

from __future__ import annotations

import pytest

from support.forked_writer import fork_writers


@pytest.fixture(autouse=True)
def forked_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_writers(monkeypatch)
