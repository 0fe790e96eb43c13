"""Layouts of a run for the numbers of machines that it may go on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from meshloom.config.problems import Problem
from meshloom.launch.nodes.placement import place
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.legality import Work, layout_and_model_problems
from meshloom.trainer import relations
from meshloom.trainer.launching import all_processes
from meshloom.trainer.resolve import ResolveOptions, resolve
from support.tiny_run import TINY

OPTIONS = ResolveOptions(lambda config: all_processes(config.launch), builds=lambda _: False)


def test_islands_are_checked_with_as_many_processes_as_their_ranks_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three machines of four have 24 processes: three whole islands of eight. Four of six would lie on two machines each."""
    seen: list[int] = []

    def checked(parallel: ParallelConfig, work: Work, world_size: int) -> Sequence[Problem]:
        seen.append(world_size)
        return layout_and_model_problems(parallel, work, world_size)

    monkeypatch.setattr(relations, "layout_and_model_problems", checked)
    local = ["optim.local={islands:4,quorum:2}", "launch.nodes=2:4", "launch.nproc=8", "checkpoint.every=2"]
    words = [*TINY, *local, "batch.samples=32", f"output_dir={tmp_path}"]
    resolved = resolve(words, OPTIONS)
    resolved.refuse()
    found = place(resolved, words, None, OPTIONS)
    assert found.words == {4: [], 3: [], 2: []} and found.notices == []
    assert seen == [8, 8, 8], "of the run, and of it on three and on two machines"


def test_a_layout_is_planned_for_a_number_on_which_the_typed_one_is_illegal(tmp_path: Path) -> None:
    """Three stages do not divide the four processes of two machines."""
    words = [*TINY, "model.layers=3", "launch.nodes=2:3", "launch.nproc=2", "checkpoint.every=2", "parallel.pp=3"]
    words.append(f"output_dir={tmp_path}")
    resolved = resolve(words, OPTIONS)
    resolved.refuse()
    found = place(resolved, words, None, OPTIONS)
    assert found.words[3] == [] and found.words[2] and not any("parallel.pp=3" in word for word in found.words[2])
    assert [notice.startswith("with 2 machines the run goes on with") for notice in found.notices] == [True]
