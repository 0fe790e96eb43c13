"""One rank of a host works for all of them: with real ranks."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from meshloom.config.per_host import after_first_on_host, share_on_host
from meshloom.config.problems import ConfigError, Problem
from support.ranks import run_ranks


def body(rank: int, world_size: int, folder: str) -> list[object]:
    attempt = Path(folder) / "attempt_0"
    (attempt / str(rank)).mkdir(parents=True, exist_ok=True)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(attempt / str(rank) / "error.json")
    said: list[object] = []

    def note(text: str) -> str:
        with (Path(folder) / text).open("a") as file:
            file.write(f"{rank}")
        return f"{text} of {rank}"

    def refuse() -> None:
        raise ConfigError([Problem("a.key", f"refused by {note('refusal')}", "mend it")])

    def fail() -> str:
        note("failure")
        if rank == 0:
            raise OSError("of the first")
        return "their own"

    said.append(share_on_host("thing", lambda: note("one")))
    said.append(share_on_host("thing", lambda: note("another")))  # the same name again is another thing
    try:
        share_on_host("thing", refuse)
    except ConfigError as error:
        said.append(str(error.problems[0]))
    try:
        said.append(share_on_host("thing", fail))
    except OSError as error:
        said.append(str(error))
    said.append(callable(share_on_host("thing", lambda: note("unpicklable") and threading.Lock().acquire)))

    def build() -> bool:
        built = Path(folder) / "built"
        if rank == 0:
            time.sleep(0.05)
            built.touch()
        return built.exists()

    said.append(after_first_on_host("data", build))
    return said


def test_the_first_rank_of_a_host_does_it_for_all(tmp_path: Path) -> None:
    found = run_ranks(3, body, str(tmp_path))
    same = ["one of 0", "another of 0", "a.key: refused by refusal of 0; mend it"]
    assert found == [[*same, own, True, True] for own in ("of the first", "their own", "their own")]
    asked = {name: sorted((tmp_path / name).read_text()) for name in ("one", "another", "refusal", "failure", "unpicklable")}
    alone, each = ["0"], ["0", "1", "2"]
    assert asked == {"one": alone, "another": alone, "refusal": alone, "failure": each, "unpicklable": each}


def test_a_rank_that_is_alone_does_its_own_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert share_on_host("thing", lambda: 1) == after_first_on_host("thing", lambda: 1) == 1
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert share_on_host("thing", lambda: 2) == 2 and not list(tmp_path.iterdir())
