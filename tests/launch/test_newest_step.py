"""The file that a launcher leaves to the script of a SLURM job."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshloom.launch import newest_step
from meshloom.launch.newest_step import NEWEST_STEP, write_newest_step
from support.checkpoint_runs import save_steps
from support.configs import resolve_words
from support.tiny_run import TINY


def test_the_newest_saved_step_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "newest"
    config = resolve_words(TINY, [f"output_dir={tmp_path / 'run'}"], 1).config
    write_newest_step(config)
    monkeypatch.setenv(NEWEST_STEP, str(file))
    write_newest_step(config)
    assert file.read_text() == "0\n"
    save_steps(tmp_path / "run" / "checkpoints", 3, 12)
    write_newest_step(config)
    assert file.read_text() == "12\n" and [path.name for path in tmp_path.iterdir() if path.is_file()] == ["newest"]


def test_nothing_is_left_where_it_can_t_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_: object) -> None:
        raise OSError("no such host")

    monkeypatch.setenv(NEWEST_STEP, str(tmp_path / "newest"))
    monkeypatch.setattr(newest_step, "read_newest", unreachable)
    write_newest_step(resolve_words(TINY, [f"output_dir={tmp_path}"], 1).config)
    assert not list(tmp_path.iterdir())
