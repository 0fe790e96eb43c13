"""The end of a run: nothing of it goes on behind the interpreter's back."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from meshloom.checkpoint.folder import find_latest
from meshloom.checkpoint.lock import FolderLock
from meshloom.parallel.torch.engine import TorchEngine
from meshloom.trainer.run import run
from meshloom.trainer.signals import DIVERGED, StopRequest
from support.configs import resolve_words
from support.engines import masters_of
from support.ranks import run_ranks
from support.tiny_run import TINY, body


def finished(rank: int, world_size: int, folder: str, *overrides: str) -> tuple[int, list[int]]:
    """The run's exit code, and how many gatherings were under way each time that its engine was finished, before and after."""
    counts: list[int] = []

    def finish(engine: TorchEngine) -> None:
        for call in (lambda: None, lambda: plain(engine)):
            call()
            counts.append(sum(bool(group.gathering) for group in masters_of(engine).units))

    plain = TorchEngine.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "finish", finish)
        return body(rank, world_size, [f"output_dir={folder}", "parallel.zero=1", *overrides]), counts


def diverged(rank: int, world_size: int, folder: str) -> list[int]:
    """Count the gatherings under way when a run has ended of a loss that is no number."""
    engines: list[TorchEngine] = []
    make = TorchEngine.__init__

    def keep(engine: TorchEngine, *rest: Any) -> None:
        make(engine, *rest)
        engines.append(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "__init__", keep)
        words = ["parallel.zero=1", "trainer.steps=6", "checkpoint.every=0", "trainer.eval_every=0", "optim.lr=1e300"]
        assert body(rank, world_size, [f"output_dir={folder}", *words, "trainer.max_grad_norm=null"]) == DIVERGED
    return [len(group.gathering) for group in masters_of(engines[0]).units]


def test_nothing_is_under_way_behind_a_run_that_diverged(tmp_path: Path) -> None:
    for under_way in run_ranks(2, diverged, str(tmp_path)):
        assert under_way and not any(under_way)


@pytest.mark.parametrize("last", ["trainer.eval_every=0", "trainer.eval_every=2"])
def test_the_last_weights_are_gathered_before_a_run_ends(tmp_path: Path, last: str) -> None:
    """A run that neither evaluates nor saves at its end leaves them under way; gloo's thread then aborted the process."""
    for code, (before, after) in run_ranks(2, finished, str(tmp_path), "trainer.steps=2", "checkpoint.every=0", last):
        assert code == 0 and after == 0
        assert before > 0 or last != "trainer.eval_every=0"


def stopped_late(rank: int, world_size: int, folder: str) -> tuple[bool, bool]:
    """Return whether this rank heard a signal that came to rank 1 behind the last step, and whether the run obeyed one."""
    words = [*TINY, f"output_dir={folder}", "trainer.steps=2", "checkpoint.every=0"]
    stop, plain = StopRequest(), TorchEngine.finish

    def finish(engine: TorchEngine) -> None:
        plain(engine)
        if rank == 1:
            signal.raise_signal(signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "finish", finish)
        assert run(resolve_words([], words, world_size), stop) == 0
    return stop.requested, stop.obeyed


def test_a_signal_behind_the_last_step_ends_a_sweep_on_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(2, stopped_late, str(tmp_path)) == [(False, True), (True, True)]


def failed(rank: int, world_size: int, folder: str) -> list[str]:
    """The threads of a run's saves when a hook has ended it with an error. Its folders can be had again."""
    with pytest.raises(RuntimeError, match="a fault of the hook's"):
        words = [
            "trainer.steps=9",
            "checkpoint.every=1",
            "checkpoint.mode=async",
            "trainer.hooks=[{_target_:support.run_hooks.Fail,step:3}]",
        ]
        body(rank, world_size, [f"output_dir={folder}", *words])
    FolderLock(Path(folder) / "checkpoints").release()
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint-")]


def test_failed_run_releases_folder_and_memory_and_threads(tmp_path: Path) -> None:
    """A thread that is still copying when the interpreter ends aborts the process."""
    assert run_ranks(1, failed, str(tmp_path)) == [[]]
    assert find_latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000002"
