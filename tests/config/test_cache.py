"""The cache: where it is, and folders that one process builds and all find whole."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from meshloom.config.cache import build_once, cache_folder


def test_the_config_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("MESHLOOM_CACHE", "/elsewhere")
    assert cache_folder("~/mine") == Path("/home/someone/mine")
    assert cache_folder(None) == Path("/elsewhere")
    monkeypatch.delenv("MESHLOOM_CACHE")
    assert cache_folder(None) == Path("/home/someone/.cache/meshloom")


def test_those_that_start_together_build_once(tmp_path: Path) -> None:
    """The second comes while the first builds, and finds what that has built."""
    target, built = tmp_path / "built", list[str]()
    inside, go_on = threading.Event(), threading.Event()

    def slowly(folder: Path) -> None:
        (folder / "one").touch()
        built.append("first")
        inside.set()
        assert go_on.wait(60)

    first = threading.Thread(target=build_once, args=(target, slowly))
    second = threading.Thread(target=build_once, args=(target, lambda folder: built.append("second")))
    first.start()
    assert inside.wait(60) and not target.exists(), "a folder in the cache is complete"
    second.start()
    go_on.set()
    first.join(60)
    second.join(60)
    assert built == ["first"] and (target / "one").exists()


def test_a_builder_that_is_killed_leaves_no_half_and_no_lock(tmp_path: Path) -> None:
    target = tmp_path / "built"

    def halfway(folder: Path) -> None:
        (folder / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        build_once(target, halfway)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not target.exists() and len(list(tmp_path.glob(".built.building-*/half"))) == 1
    build_once(target, lambda folder: (folder / "whole").touch())
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["built"], "neither a half nor the lock stays"
    build_once(target, lambda folder: pytest.fail("built again"))


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "built", fail)
    assert not (tmp_path / "built").exists() and not list(tmp_path.glob("*.building-*"))
