"""Causes for the host to wait for a GPU's queue at every micro-batch, seen without a GPU: memory that is not the loader's
pinned own on its way to the device, and documents counted on the device.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from meshloom.data.batch import MicroBatch
from meshloom.optim.optimizers.adagrad import AdaGradNorm
from meshloom.optim.optimizers.agvm import AGVM
from meshloom.optim.optimizers.config import AdaGradNormConfig, AGVMConfig, LAMBConfig, LARSConfig
from meshloom.optim.optimizers.layerwise import LAMB, LARS
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import EngineSettings
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from support.models import decoder
from support.parity import Work, build, share
from support.ranks import run_ranks


def watched(rank: int, world_size: int, work: Work) -> tuple[bool, bool]:
    """Return whether just the loader's tensors were sent, and whether nothing on the device was asked for its documents."""
    engine = build(work, world_size)
    mine = share(engine.mesh, work, 0)
    batches = mine.micro_batches
    own = {tensor.data_ptr() for batch in batches for tensor in tensors_of(batch)}
    sent: set[int] = set()
    alive: list[object] = []  # so that no address is used twice
    there: set[int] = set()
    asked: set[int] = set()
    to, ask = MicroBatch.to, torch.Tensor.tolist

    def copied(batch: MicroBatch, device: torch.device) -> MicroBatch:
        """A copy, as on a GPU."""
        sent.update(tensor.data_ptr() for tensor in tensors_of(batch))
        moved = to(batch, device)
        documents = moved.documents
        assert documents is not None
        documents = documents._replace(ids_BS=documents.ids_BS.clone(), cu_seqlens=documents.cu_seqlens.clone())
        found = MicroBatch(moved.tokens_BS.clone(), moved.targets_BS.clone(), documents)
        alive.append(found)
        there.update(tensor.data_ptr() for tensor in tensors_of(found))
        return found

    def read(tensor: torch.Tensor) -> Any:
        alive.append(tensor)
        asked.add(tensor.data_ptr())
        return ask(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicroBatch, "to", copied)
        patch.setattr(torch.Tensor, "tolist", read)
        engine.accumulate(mine, torch.tensor(float(mine.valid_tokens), dtype=torch.float64))
        engine.evaluate(batches)
    return bool(sent) and sent <= own, bool(asked) and not asked & there


def tensors_of(batch: MicroBatch) -> list[torch.Tensor]:
    """Return the tensors of a micro-batch that are sent to the device."""
    assert batch.documents is not None
    return [batch.tokens_BS, batch.targets_BS, batch.documents.ids_BS, batch.documents.cu_seqlens]


def title(value: object) -> str:
    if isinstance(value, ParallelConfig):
        return f"{value.engine}-zero{value.zero}-tp{value.tp}-pp{value.pp}{value.schedule}-cp{value.cp}-{value.cp_kind}"
    return str(value)


LAYOUTS = [
    (1, ParallelConfig(zero=0)),
    (2, ParallelConfig(zero=3)),
    (2, ParallelConfig(cp=2)),
    (2, ParallelConfig(cp=2, cp_kind="ulysses")),
    (2, ParallelConfig(tp=2)),
    (2, ParallelConfig(pp=2)),
    (2, ParallelConfig(pp=2, schedule="zbv")),
    (1, ParallelConfig(engine="deepspeed", zero=1)),
]


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS, ids=title)
def test_nothing_is_asked_of_the_device(ranks: int, parallel: ParallelConfig) -> None:
    precision = "fp64"
    if parallel.engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
        precision = "fp32"
    work = Work(parallel, documents=True, precision=precision, model=(("layers", 4),))
    assert run_ranks(ranks, watched, work) == [(True, True)] * ranks


OPTIMIZERS = {
    "lamb": functools.partial(LAMB, LAMBConfig(lr=0.01)),
    "lars": functools.partial(LARS, LARSConfig(lr=0.01)),
    "adagrad_norm": functools.partial(AdaGradNorm, AdaGradNormConfig(lr=0.01)),
}


def halves_compared(rank: int, world_size: int) -> None:
    """AGVM's third step: what it compares is on the device, and the scales that come back are all that the host asks for."""
    parallel = ParallelConfig(zero=1)
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**Work().llama())
    engine = make_engine(
        model, mesh, functools.partial(AGVM, AGVMConfig(interval=1)), parallel, EngineSettings(precision="fp64")
    )
    for number in range(3):
        tokens = torch.tensor(100.0, dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            if number == 2:
                patch.setattr(torch, "tensor", None)
            engine.accumulate(share(mesh, Work(halves=True), number), tokens)
            engine.update(0.01)


def test_agvm_sends_no_numbers_when_it_compares_halves() -> None:
    run_ranks(2, halves_compared)


def updated(rank: int, world_size: int, name: str) -> None:
    """A second update, in which a tensor made of numbers would be one more copy to the device out of pageable memory."""
    parallel = ParallelConfig(zero=3)
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**Work().llama())
    engine = make_engine(model, mesh, OPTIMIZERS[name], parallel, EngineSettings(precision="fp64"))
    for number in (0, 1):
        engine.accumulate(share(mesh, Work(), number), torch.tensor(100.0, dtype=torch.float64))
        with pytest.MonkeyPatch.context() as patch:
            if number:
                patch.setattr(torch, "tensor", None)
            engine.update(0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_by_whole_parameters_sends_no_numbers(name: str) -> None:
    run_ranks(2, updated, name)
