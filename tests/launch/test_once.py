"""Messages of all ranks are said once, and a user's hook that fails is named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from meshloom.config.problems import ConfigError
from meshloom.launch.once import OncePerNode, hook_failure, is_first
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.hooks.build import build_hook


@pytest.fixture
def become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes this process a rank of one attempt of torchrun's."""

    def rank(number: int, attempt: int = 0) -> None:
        folder = tmp_path / f"attempt_{attempt}" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))

    return rank


def test_a_text_is_said_by_the_first_rank_of_each_attempt(become) -> None:
    said = []
    for attempt in (0, 1):
        for number in (0, 1, 2):
            become(number, attempt)
            said.append((is_first("the disk is full"), is_first(f"rank {number} is slow")))
    assert said == [(True, True), (False, True), (False, True)] * 2


def test_without_torchrun_everything_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert is_first("a text") and is_first("a text")


def test_warnings_are_written_once_but_a_repeated_one_again(become) -> None:
    written: list[int] = []
    warning = logging.LogRecord("meshloom", logging.WARNING, "", 0, "step %s was slow", ("x",), None)
    information = logging.LogRecord("meshloom", logging.INFO, "", 0, "hello", (), None)
    for number in (0, 1):
        become(number)
        once = OncePerNode()
        written.append(sum(once.filter(warning) for _ in range(3 + number)))
        assert once.filter(information)
    assert written == [3, 1]  # the second rank warns a fourth time, which no other has


class Failing(Hook):
    """A hook of a user's own."""

    def __init__(self, server: str | None = None) -> None:
        if server is not None:
            raise RuntimeError(f"no server {server}")

    def on_step_end(self, loop: object) -> None:
        raise ValueError("the hook's own fault")


def test_a_hook_of_ones_own_that_fails_is_named() -> None:
    with pytest.raises(ValueError) as caught:
        Failing().on_step_end(None)
    told = hook_failure(caught.value) or ""
    assert told.startswith(
        f"trainer.hooks: {Failing.__module__}.Failing.on_step_end failed: ValueError: the hook's own fault\n"
    )
    assert "test_once.py" in told and "with pytest.raises" not in told
    assert hook_failure(ValueError("elsewhere")) is None


def test_a_hook_that_can_not_be_built_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshloom.trainer.hooks.base.Failing", Failing, raising=False)
    with pytest.raises(ConfigError, match=r"trainer\.hooks: .*Failing can't be built: RuntimeError: no server x; "):
        build_hook({"_target_": "meshloom.trainer.hooks.base.Failing", "server": "x"})
