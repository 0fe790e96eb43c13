"""Groups of parameters: a model whose weights are held in several ways, over several meshes, trains as one held in one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh, WeightAxes
from meshloom.parallel.torch import engine as torch_engine
from meshloom.parallel.torch.groups import ParameterGroup, gather_units, group_of, parameter_groups
from support.models import decoder
from support.parity import Run, Work, build, differences, runs
from support.ranks import run_ranks


def is_embedding(module: str) -> bool:
    return module == "embed"


def is_feed_forward(module: str) -> bool:
    return module.endswith(".ffn")


@dataclass(frozen=True)
class Case:
    """A layout, and a second group beside the dense one.

    rows  sizes of the second group's axes, (copies, shards); None: those of the dense one
    """

    parallel: ParallelConfig
    modules: Callable[[str], bool]
    dense: bool
    second: bool
    rows: tuple[int, int] | None = None
    model: tuple[tuple[str, Any], ...] = ()


CASES = {
    "embedding whole, the rest fully sharded": Case(ParallelConfig(zero=3), is_embedding, dense=True, second=False),
    "embedding fully sharded, the rest whole": Case(ParallelConfig(zero=1), is_embedding, dense=False, second=True),
    "feed-forwards sharded wider": Case(ParallelConfig(zero=3, replicate=2), is_feed_forward, True, True, rows=(1, 4)),
    "feed-forwards' masters sharded less": Case(ParallelConfig(zero=1), is_feed_forward, False, False, rows=(2, 2)),
    "feed-forwards whole in fully sharded blocks": Case(
        ParallelConfig(zero=2), is_feed_forward, True, False, rows=(4, 1), model=(("tied", True),)
    ),
}


@contextlib.contextmanager
def grouped(case: Case) -> Iterator[None]:
    """Have engines hold their weights in the case's two groups."""
    connect = Mesh.connect

    def connected(layout: Layout, device: torch.device) -> Mesh:
        mesh = connect(layout, device)
        mesh.weight_axes["second"] = mesh.weight_axes["dense"]
        if case.rows is not None:
            root = init_device_mesh("cpu", case.rows, mesh_dim_names=("copies", "shards"))
            both = root if case.rows[0] > 1 else root["shards"]
            mesh.weight_axes["second"] = WeightAxes(root["shards"], root["copies"], both)
        return mesh

    with pytest.MonkeyPatch.context() as patch:
        groups = [ParameterGroup("second", case.second, case.modules), ParameterGroup("dense", case.dense)]
        patch.setattr(Mesh, "connect", connected)
        patch.setattr(torch_engine, "parameter_groups", lambda *_: groups)
        yield


def in_groups(rank: int, world_size: int, works: list[tuple[Case, Work]]) -> list[Run]:
    """As `runs`, each under its groups."""
    found: list[Run] = []
    for case, work in works:
        with grouped(case):
            found += runs(rank, world_size, [work])
    return found


def copies(rank: int, world_size: int, case: Case) -> tuple[set[int], set[int]]:
    """Ranks that hold each element of the second group's weights, and of the dense one's."""
    with grouped(case):
        engine = build(Work(case.parallel), world_size)
    assert isinstance(engine, torch_engine.TorchEngine)
    second, dense = (strategy.local.values() for strategy in engine.weights.strategies)
    return {weight.placed.copies for weight in second}, {weight.placed.copies for weight in dense}


@pytest.mark.parametrize("name", ["feed-forwards sharded wider", "feed-forwards' masters sharded less"])
def test_each_group_is_cut_over_its_own_ranks(name: str) -> None:
    case = CASES[name]
    assert case.rows is not None
    assert run_ranks(4, copies, case) == [({case.rows[0]}, {case.parallel.replicate})] * 4


def test_two_groups_train_as_one() -> None:
    """Losses, norms and gradients, also of an evaluation, over several micro-batches."""
    pairs = [(case, Work(case.parallel, steps=2, model=case.model)) for case in CASES.values()]

    works = [work for _, work in pairs]
    found = differences(4, works, body=lambda rank, world_size, _: in_groups(rank, world_size, pairs))
    for name, difference in zip(CASES, found, strict=True):
        assert difference.worst < 1e-9, name


def test_every_weight_is_in_one_unit_of_one_group() -> None:
    with torch.device("meta"):
        model = decoder(**Work(model=(("tied", True),)).llama())
    groups = [ParameterGroup("ffn", True, is_feed_forward), *parameter_groups(ParallelConfig(), Layout(shard=2))]
    units = [unit for group in groups for unit in gather_units(model, group, groups)]
    found = [id(weight) for unit in units for weight in unit.weights]
    assert sorted(found) == sorted(id(weight) for weight in model.parameters())
    assert [group_of(name, groups).name for name in ("layers.1.ffn.w2.weight", "layers.1.ffn_norm.weight")] == ["ffn", "dense"]
    assert [unit.module for unit in units[:2]] == [model.layers["0"].ffn, model.layers["1"].ffn]
    assert units[-1].module is model and model.embed in units[-1].readers, "a tied head is read at the beginning, too"
