"""The checkpoint that a run resumes from; a run does not begin anew in silence where none is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from meshloom.checkpoint.convert.compose import compose
from meshloom.config.problems import ConfigError
from meshloom.trainer.find_checkpoint import checkpoint_to_resume


def today(output_dir: Path, folder: Path | str | None = None, resume: str = "auto") -> DictConfig:
    return OmegaConf.create(
        {"resume": resume, "output_dir": str(output_dir), "checkpoint": {"folder": None if folder is None else str(folder)}}
    )


def described(output_dir: Path, folder: Path | str | None) -> None:
    """A run's folder, whose config names a folder of checkpoints."""
    output_dir.mkdir()
    OmegaConf.save(today(output_dir, folder), output_dir / "config.yaml")


@pytest.mark.parametrize("resume", ["auto", "auto:elsewhere"])
@pytest.mark.parametrize("typed", [False, True])
def test_a_forgotten_folder_of_checkpoints_is_refused(tmp_path: Path, resume: str, typed: bool) -> None:
    """The first run typed checkpoint.folder and the second did not, or the other way round."""
    run, other = tmp_path / "run", tmp_path / "other"
    described(run, None if typed else other)
    place = run / "checkpoints" if typed else other
    compose(place, 3, [], {})
    with pytest.raises(ConfigError, match=f"checkpoint.folder: .*type checkpoint.folder={place}"):
        checkpoint_to_resume(today(run, other if typed else None, resume))
    assert checkpoint_to_resume(today(run, place, resume)) == str(place)


def test_a_run_that_has_saved_nothing_anywhere_begins(tmp_path: Path) -> None:
    described(tmp_path / "run", tmp_path / "other")
    assert checkpoint_to_resume(today(tmp_path / "run")) is None
    assert checkpoint_to_resume(today(tmp_path / "none")) is None


def test_a_folder_that_can_not_be_read_is_not_taken_for_empty(tmp_path: Path) -> None:
    described(tmp_path / "run", "nosuch://bucket/run")
    with pytest.raises(ConfigError, match="can't be read now"):
        checkpoint_to_resume(today(tmp_path / "run"))


def test_a_run_whose_folder_was_moved_is_found_there(tmp_path: Path) -> None:
    described(tmp_path / "run", None)
    compose(tmp_path / "run/checkpoints", 3, [], {})
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert checkpoint_to_resume(today(moved)) == str(moved / "checkpoints")
