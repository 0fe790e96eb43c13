"""Islands that are lost and come between two starts of a run, beside a bare PyTorch loop with models that go and come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.folder import step_name
from meshloom.checkpoint.restore import Wanted, read_manifest, restore
from meshloom.data.assignment import Assigner
from meshloom.data.batch import GlobalBatch
from meshloom.optim.local.config import LocalConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.torch.islands import for_islands_of, is_of_absent_island
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.loop import Loop
from support.islands import Curve, plain_islands
from support.parity import HELD_OUT, UnevenSamples, Work, build, take_steps
from support.ranks import run_ranks

ROUND = LocalConfig(islands=3, quorum=1, inner_steps=3)
METHODS = {
    "DiLoCo": ROUND,
    "CO2": replace(ROUND, lr=1.0, momentum=0.2, nesterov=False, delay=3),
    "in fragments, late, mixed": replace(ROUND, fragments=2, inner_steps=4, delay=2, mix=0.5),
}
STEPS = 11
STRETCHES = ((0, 3), (5, 1), (7, 2))
"""(Steps before, islands from there on): in the middle of rounds, and with differences under way."""


@dataclass
class StopAfter(Hook):
    """Ends a stretch of a run."""

    step: int

    def on_step_end(self, loop: Loop) -> None:
        loop.stopping |= loop.progress.step == self.step


def stretch(rank: int, world_size: int, folder: Path, number: int) -> list[Curve]:
    """Train from one change of islands to the next, and save. The evaluation is of what is saved."""
    begin, islands = STRETCHES[number]
    end = STRETCHES[number + 1][0] if number + 1 < len(STRETCHES) else STEPS
    found: list[Curve] = []
    for name, local in METHODS.items():
        work = Work(ParallelConfig(zero=1), steps=STEPS, samples=7, lr=2e-3, local=local)
        engine = build(work, world_size)
        assert (engine.mesh.across is None) == (islands == 1)  # type: ignore[attr-defined]
        control = Control(
            rank, world_size, torch.distributed.PrefixStore(name, torch.distributed.distributed_c10d._get_default_store())
        )
        if begin:
            engine.prepare_restore()
            saved = STRETCHES[number - 1][1]
            fragments = for_islands_of(engine.fragments(), saved, elastic=True)
            source = folder / name / step_name(begin)
            wanted = Wanted(fragments, {key for key in read_manifest(source).arrays if is_of_absent_island(key, islands)})
            report = restore(source, lambda _, wanted=wanted: wanted, control)
            engine.load_counters(report.state["counters"])
        losses = take_steps(engine, work, range(begin, STEPS), StopAfter(end)).losses
        checkpointer = Checkpointer(folder / name, control, CheckpointConfig(mode="sync", timeout=60))
        checkpointer.save(end, engine.fragments(), {"counters": engine.counters()}, required=True)
        checkpointer.finish()
        held_out = Assigner(1).load(UnevenSamples(False), GlobalBatch(HELD_OUT, work.samples), work.micro, 0)
        found.append(Curve(losses, float(engine.evaluate(held_out.micro_batches).mean)))
        engine.finish()
    return found


def test_a_run_goes_on_with_the_islands_that_are_there(tmp_path: Path) -> None:
    """Each island's difference counts by its tokens; one that comes begins at the outer weights."""
    stretches = [run_ranks(islands, stretch, tmp_path, number) for number, (_, islands) in enumerate(STRETCHES)]
    for at, (name, local) in enumerate(METHODS.items()):
        work = Work(ParallelConfig(zero=1), steps=STEPS, samples=7, lr=2e-3, local=local)
        expected = plain_islands(work, {before + 1: islands for before, islands in STRETCHES})
        losses = [loss for ranks in stretches for loss in ranks[0][at].losses]
        assert losses == pytest.approx(expected[0].losses, rel=1e-9), name
        for rank in stretches[-1]:
            assert rank[at].evaluated == pytest.approx(expected[0].evaluated, rel=1e-9), name
