"""Optimizer state of any shape and cut: trained on every layout, saved, and resumed under another, as one process does."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.restore import restore
from meshloom.optim.optimizers.own_arrays import OwnArray
from meshloom.optim.optimizers.parameters import NamedParameter, Shards, Unsharded
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.deepspeed.optimizer import optimizer_problems
from meshloom.parallel.engine import Engine
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.optimizer_state import optimizer_fragments
from support.checkpoint_runs import stored_boxes
from support.factored import Factored
from support.models import decoder
from support.parity import Work, take_steps
from support.ranks import run_ranks
from support.settings import settings_of

WORK = Work(samples=8, micro=3, max_norm=None)  # three micro-batches: one for each rank of ZeRO-3, two passes on two ranks
LAYOUTS = {
    "zero0": (2, ParallelConfig(zero=0)),
    "zero1": (2, ParallelConfig(zero=1)),
    "zero2": (2, ParallelConfig(zero=2)),
    "zero3": (3, ParallelConfig(zero=3)),
    "tp2": (2, ParallelConfig(zero=0, tp=2)),
    "tp2_zero1": (4, ParallelConfig(zero=1, tp=2)),
    "tp2_zero3": (4, ParallelConfig(zero=3, tp=2)),
    "pp2": (2, ParallelConfig(zero=1, pp=2)),
}


def build(parallel: ParallelConfig, world_size: int) -> Engine:
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**WORK.llama())
    stage = dist.get_process_group_ranks(mesh.group("stage"))

    def owns(number: int) -> bool:
        return stage[number % len(stage)] == mesh.rank

    optimizer = functools.partial(Factored, lr=0.01, owns=owns)
    return make_engine(model, mesh, optimizer, parallel, settings_of(model, parallel, seed=7))


def control(engine: Engine, name: str) -> Control:
    return Control(engine.mesh.rank, engine.mesh.layout.world_size, engine.mesh.store(name))


def begun(rank: int, world_size: int, parallel: ParallelConfig, folder: Path) -> list[float]:
    """Train three steps, and save."""
    engine = build(parallel, world_size)
    losses = take_steps(engine, WORK, range(3)).losses
    checkpointer = Checkpointer(folder, control(engine, "save"), CheckpointConfig(mode="sync", timeout=60))
    checkpointer.save(3, engine.fragments(), {"counters": engine.counters()})
    checkpointer.finish()
    return losses


def gone_on(rank: int, world_size: int, parallel: ParallelConfig, folder: Path) -> list[float]:
    """Train three more steps from that save."""
    engine = build(parallel, world_size)
    engine.prepare_restore()
    report = restore(folder, engine.fragments(), control(engine, "restore"))
    assert not report.converted
    engine.load_counters(report.state["counters"])
    return take_steps(engine, WORK, range(3, 6)).losses


def alone(rank: int, world_size: int) -> list[float]:
    return take_steps(build(ParallelConfig(zero=0), 1), WORK, range(6)).losses


@pytest.fixture(scope="module")
def expected() -> list[float]:
    (losses,) = run_ranks(1, alone)
    assert len({round(loss, 6) for loss in losses}) == 6
    return losses


PAIRS = [
    *(("zero0", "zero3"), ("zero1", "tp2_zero3"), ("zero2", "zero1"), ("zero3", "tp2")),
    *(("tp2", "pp2"), ("tp2_zero1", "zero2"), ("tp2_zero3", "zero0"), ("pp2", "tp2_zero1")),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_arrays_of_any_shape_move_between_layouts(tmp_path: Path, expected: list[float], first: str, second: str) -> None:
    ranks, parallel = LAYOUTS[first]
    for losses in run_ranks(ranks, begun, parallel, tmp_path):
        assert losses == pytest.approx(expected[:3], rel=1e-9)
    ranks, parallel = LAYOUTS[second]
    for losses in run_ranks(ranks, gone_on, parallel, tmp_path):
        assert losses == pytest.approx(expected[3:], rel=1e-9)


def test_the_manifest_has_them_in_their_own_shapes(tmp_path: Path) -> None:
    run_ranks(4, begun, LAYOUTS["tp2_zero3"][1], tmp_path)
    arrays = load_manifest(open_files(tmp_path / "step-00000003")).arrays
    dim, ffn = WORK.llama()["dim"], WORK.llama()["ffn_dim"]
    name = "layers.0.ffn.w1.weight"
    shapes = {role: arrays[f"{role}/{name}"].shape for role in ("weight", "row", "column", "whole")}
    assert shapes == {"weight": (ffn, dim), "row": (ffn,), "column": (dim,), "whole": (ffn, dim)}
    counts = [len(stored_boxes(tmp_path / "step-00000003", f"{role}/{name}")) for role in ("weight", "whole")]
    assert counts == [4, 1], "one rank owns it"
    assert arrays["run/histogram"].shape == (5,)


def probe(name: str = "w") -> NamedParameter:
    return NamedParameter(name, torch.nn.Parameter(torch.ones(3, 2)), (6, 4), offsets=(3, 2))


def test_an_array_along_some_dims_is_cut_as_these_are() -> None:
    row, column = (OwnArray.along(probe(), "m", torch.zeros(n), [dim]) for n, dim in ((3, 0), (2, 1)))
    assert (row.global_shape, row.offsets, column.global_shape, column.offsets) == ((6,), (3,), (4,), (2,))


def test_an_array_of_another_shape_that_is_not_declared_is_named() -> None:
    class Undeclared(torch.optim.SGD):
        pass

    parameter = probe("layers.0.ffn.w1.weight")
    optimizer = Undeclared([parameter.tensor])
    optimizer.state[parameter.tensor]["sketch"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"Undeclared keeps 'sketch' of shape \[7\] for layers.0.ffn.w1.weight.*own_arrays"):
        list(optimizer_fragments(optimizer, [parameter]))


def test_deepspeed_refuses_them_by_key() -> None:
    def make(parameters: list[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
        return Factored(parameters, Unsharded(), lr=0.01)

    (problem,) = optimizer_problems(make)
    assert problem.key == "optim" and "shapes are their own" in problem.message and "parallel.engine=torch" in problem.fix
