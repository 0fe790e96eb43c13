"""Tests of checkpoints fork their writers, but for those marked `started_writers`: an interpreter for each took most of a save.

`benchmarks/checkpoint_crash.py` starts those of the crash matrix as a trainer does.
"""

from __future__ import annotations

import pytest

from support.forked_writer import fork_writers


@pytest.fixture(autouse=True)
def forked_writers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "started_writers" not in request.keywords:
        fork_writers(monkeypatch)
