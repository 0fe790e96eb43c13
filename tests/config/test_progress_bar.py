"""The bar of long commands, and what conversions tell it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from meshloom.checkpoint.convert.compose import Source, compose
from meshloom.checkpoint.convert.progress import listening
from meshloom.config import progress_bar as shown
from meshloom.launch.cli import main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_now_and_then_and_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    log, terminal = io.StringIO(), Terminal()
    for output in (log, terminal):
        monkeypatch.setattr(sys, "stderr", output)
        for every in (1e9, 0.0):
            monkeypatch.setattr(shown, "EVERY", every)
            with shown.progress("reading") as advance:
                advance(1, 4)
    assert log.getvalue() == "reading: 25%\n", "nothing of what takes less time"
    assert "reading" in terminal.getvalue() and "25%" in terminal.getvalue()


def test_where_the_size_is_not_known_a_line_says_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "EVERY", 0.0)
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with shown.progress("reading", announce=True) as advance:
        advance(1, 0)
        advance(5, 4)
    assert log.getvalue() == "reading …\nreading: …\nreading: 100%\n", "a total may be a guess"


@pytest.mark.parametrize("quiet", [False, True])
def test_what_the_block_prints_arrives_beside_a_bar(monkeypatch: pytest.MonkeyPatch, *, quiet: bool) -> None:
    """As in `meshloom checkpoint verify … > report.txt` on a terminal."""
    report, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", report)
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown.progress("reading", quiet=quiet) as advance:
        advance(1, 4)
        print("found")
        print("warned", file=sys.stderr)
    assert report.getvalue() == "found\n"
    assert terminal.getvalue() == "warned\n" if quiet else "warned" in terminal.getvalue()


def test_conversions_tell_how_far_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    sources = [Source(name, "weight", torch.float32, (64, 4), lambda: torch.ones(64, 4)) for name in ("a", "b", "c")]
    with listening(lambda done, total: told.append((done, total))):
        step = compose(tmp_path / "made", 1, sources, {})
    assert len(told) == 3 and told == sorted(told) and told[-1][0] == told[-1][1] >= 3 * 64 * 4 * 4
    monkeypatch.setattr(shown, "EVERY", 0.0)
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert main(["checkpoint", "verify", str(step)]) == 0
    assert log.getvalue().splitlines()[-1].endswith(": 100%")
