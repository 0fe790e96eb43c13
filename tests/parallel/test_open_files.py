"""The limit of open files is raised to what a run needs, and where that is not allowed its need is said."""

from __future__ import annotations

import logging
import resource

import pytest

from meshloom.parallel.open_files import files_needed, raise_file_limit


@pytest.mark.parametrize(
    ("world", "limits", "expected", "warned"),
    [
        (8, (1024, 4096), None, False),
        (512, (1024, 4096), (2560, 4096), False),
        (4096, (1024, 4096), (4096, 4096), True),
        (4096, (1024, resource.RLIM_INFINITY), (16896, resource.RLIM_INFINITY), False),
        (4096, (4096, 4096), None, True),
    ],
)
def test_the_limit_follows_the_number_of_processes(
    world: int,
    limits: tuple[int, int],
    expected: tuple[int, int] | None,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: given.append(values))
    with caplog.at_level(logging.WARNING):
        raise_file_limit(world, tell=True)
    assert given == ([] if expected is None else [expected])
    assert (f"{files_needed(world)} open files" in caplog.text) == warned
