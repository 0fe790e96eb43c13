"""Memory that copy engines reach: the same on all ranks, used again only when it is free, and let go in order.

Here the CPU's stands for it, and gloo for the copy engines. Whatever nobody wrote to is not a number.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from meshloom.parallel import hosts
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh, WeightAxes
from meshloom.parallel.torch import transport, weights
from meshloom.parallel.torch.fully_sharded import ReduceScatter
from meshloom.parallel.torch.masters import materialize
from meshloom.parallel.torch.transport import ALIGNED, SEGMENT, Transport, choose_transport
from support.engines import masters_of
from support.models import decoder
from support.parity import Work, build, share, step
from support.ranks import run_ranks

CPU = torch.device("cpu")


class Reached(Transport):
    """Does with the CPU's memory what copy engines' need."""

    def __init__(self, group: Any) -> None:
        super().__init__(group, CPU)
        self.sizes: list[int] = []
        self.twins: list[Reached] = []

    @property
    def by_copy_engines(self) -> bool:
        return True

    def piece(self, size: int) -> torch.Tensor:
        self.sizes.append(size)
        with torch.inference_mode(False):
            return torch.full((size,), 255, dtype=torch.uint8)  # in every floating dtype not a number

    def twin(self, mesh: Mesh, axes: WeightAxes) -> Transport:
        self.twins.append(Reached(axes.shards.get_group()))
        return self.twins[-1]


def reached(mesh: Mesh, axes: WeightAxes, parallel: ParallelConfig) -> Transport:
    return Reached(axes.shards.get_group())


def alone() -> Reached:
    return Reached(SimpleNamespace(size=lambda: 2))


# Runs that are trained.

BF16: dict[str, Any] = {"precision": "bf16", "samples": 4}
TWO = {
    "ZeRO-1, one micro-batch, tied head": Work(ParallelConfig(zero=1), micro=2, **BF16, model=(("tied", True),)),
    "ZeRO-1, two micro-batches": Work(ParallelConfig(zero=1), **BF16),
    "ZeRO-1 in fp32": Work(ParallelConfig(zero=1), precision="fp32", samples=4),
    "ZeRO-2": Work(ParallelConfig(zero=2), **BF16),
    "ZeRO-3": Work(ParallelConfig(zero=3), **BF16),
    "ZeRO-3, offloaded": Work(ParallelConfig(zero=3, offload="cpu"), **BF16),
    "ZeRO-3 in fp32, tied head": Work(ParallelConfig(zero=3), precision="fp32", samples=4, model=(("tied", True),)),
    "cp 2": Work(ParallelConfig(zero=1, cp=2), micro=2, **BF16),
}
FOUR = {
    "HSDP, ZeRO-1": Work(ParallelConfig(zero=1, replicate=2), **BF16),
    "HSDP, ZeRO-3": Work(ParallelConfig(zero=3, replicate=2), **{**BF16, "samples": 8}),
    "tp 2 × ZeRO-1": Work(ParallelConfig(zero=1, tp=2), **BF16),
    "tp 2 × ZeRO-3": Work(ParallelConfig(zero=3, tp=2), **BF16),
    "pp 2 × ZeRO-3": Work(ParallelConfig(zero=3, pp=2), **BF16, model=(("layers", 4),)),
}


def trained(work: Work, world_size: int) -> tuple[list[float], str]:
    """Losses and norms of steps with an evaluation between them, and a digest of the weights that they end with."""
    engine = build(work, world_size)
    curve = [*step(engine, work, 0)]
    curve.append(float(engine.evaluate(share(engine.mesh, work, 100).micro_batches).mean))
    curve += step(engine, work, 1)
    digest = hashlib.sha256()
    for fragment in engine.fragments():
        digest.update(fragment.tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return curve, digest.hexdigest()


def both_ways(rank: int, world_size: int, works: dict[str, Work]) -> list[str]:
    """Names of the works that end elsewhere if copy engines are used."""
    found: list[str] = []
    for name, work in works.items():
        plain = trained(work, world_size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "choose_transport", reached)
            other = trained(work, world_size)
        assert len(set(plain[0])) == len(plain[0]), "the weights change"
        if plain != other:
            found.append(f"{name}: {plain} and {other}")
    return found


@pytest.mark.parametrize(("ranks", "works"), [(2, TWO), (4, FOUR)])
def test_copy_engine_memory_gives_the_same_bits_on_all_layouts(ranks: int, works: dict[str, Work]) -> None:
    assert run_ranks(ranks, both_ways, works) == [[]] * ranks


def asked_for(rank: int, world_size: int, works: list[Work]) -> list[tuple[list[int], list[int], int]]:
    """By work: the sizes of the pieces for gathering and for exchanging, and the bytes of the largest group of weights."""
    found: list[tuple[list[int], list[int], int]] = []
    for work in works:
        given: list[Reached] = []

        def give(mesh: Mesh, axes: WeightAxes, parallel: ParallelConfig, given: list[Reached] = given) -> Transport:
            given.append(Reached(axes.shards.get_group()))
            return given[0]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "choose_transport", give)
            for _ in range(2):
                trained(work, world_size)
            ours = given[0]
        exchanging = ours.twins[0].sizes if ours.twins else []
        block = 2 * (2 * 24 + 2 * 24 * 24 + 2 * 12 * 24 + 3 * 24 * 36)  # norms, queries and outputs, keys and values, SwiGLU
        found.append((ours.sizes, exchanging, block))
    return found


def test_buffers_hold_no_more_than_is_on_its_way_at_once() -> None:
    """`cost.py` counts it: two groups that are gathered, and one as it is sent and as it is received."""
    works = [Work(ParallelConfig(zero=zero), **BF16) for zero in (2, 3)]
    first, second = run_ranks(2, asked_for, works)
    assert first == second, "the ranks ask for the same"
    for gathering, exchanging, largest in first:
        assert len(gathering) == len(exchanging) == 2
        assert max(*gathering, *exchanging) <= largest


def waited_for(rank: int, world_size: int) -> tuple[int, int, bool]:
    """Exchanges begun and waited for when a pass has failed and another begins, and whether that one ends well."""
    begun: list[Any] = []
    exchange = dist.all_to_all_single

    def watched(*args: Any, **keys: Any) -> Any:
        begun.append(exchange(*args, **keys))
        wait = begun[-1].wait
        return SimpleNamespace(wait=lambda: (waits.append(1), wait()))

    waits: list[int] = []
    work = Work(ParallelConfig(zero=1), micro=2, **BF16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "choose_transport", reached)
        engine = build(work, world_size)
        masters = masters_of(engine)

        def fail(gradient: torch.Tensor) -> None:
            raise RuntimeError("no more")

        first = next(iter(dict(engine.module.named_modules())["layers.0"].parameters()))
        patch.setattr(dist, "all_to_all_single", watched)
        handle = first.register_hook(fail)
        with pytest.raises(RuntimeError, match="no more"):
            step(engine, work, 0)
        handle.remove()
        before = len(begun)
        masters.begin_step(single=True, fused=False)
        waited = len(waits)
        engine.zero_grad()
        return before, waited, all(value == value for value in step(engine, work, 0))


def test_failed_pass_leaves_no_transfer_into_the_next_one() -> None:
    for begun, waited, well in run_ranks(2, waited_for):
        assert begun == waited > 0 and well


# The rules of the memory.


def test_buffer_is_the_same_memory_and_has_one_tenant() -> None:
    memory = alone()
    memory.reserve(100)
    one = memory.buffer(0, (60,), torch.bfloat16, CPU)
    two = memory.buffer(1, (5, 10), torch.bfloat16, CPU)
    assert memory.sizes == [200, 200] and two.shape == (5, 10)
    at, part = one.data_ptr(), one.view(2, 30)[1:]
    del one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "PATIENCE", 0.05)
        with pytest.raises(RuntimeError, match="in use"):
            memory.buffer(0, (1,), torch.bfloat16, CPU)
        del part
        with torch.inference_mode():
            again = memory.buffer(0, (50,), torch.float32, CPU)
    assert again.data_ptr() == at and again.dtype is torch.float32 and not again.is_inference()
    del again
    with pytest.raises(RuntimeError, match="too small"):
        memory.buffer(0, (51,), torch.float32, CPU)


def test_without_copy_engines_memory_is_the_allocators() -> None:
    plain = Transport(alone().group, CPU)
    assert not plain.by_copy_engines
    plain.close()
    like = torch.empty(0, dtype=torch.bfloat16)
    for tensor in (
        plain.buffer(0, (2, 3), torch.bfloat16, CPU),
        *plain.exchange_buffers((2, 3), like),
        *plain.permanent([(2, 3)], like.dtype),
    ):
        assert tensor.shape == (2, 3) and tensor.dtype is torch.bfloat16


def test_exchange_buffers_are_the_same_memory_each_time() -> None:
    memory = alone()
    memory.reserve(24)
    memory.reserve(12)
    like = torch.empty(0, dtype=torch.bfloat16)
    sent, received = memory.exchange_buffers((2, 12), like)
    assert abs(received.data_ptr() - sent.data_ptr()) >= 24 * 2
    assert [part.data_ptr() for part in memory.exchange_buffers((2, 3), like)] == [sent.data_ptr(), received.data_ptr()]
    assert memory.exchange_buffers((2, 3), like.float())[0].dtype is torch.float32
    assert len(memory.sizes) == 2


def test_weights_lie_in_one_piece_and_a_tied_one_once() -> None:
    with torch.device("meta"):
        model = decoder(dim=24, layers=2, heads=4, kv_heads=2, ffn_dim=36, vocabulary=61, tied=True)
    memory = alone()
    materialize(model, list(model.parameters()), torch.bfloat16, CPU, memory)
    parameters = list(model.parameters())
    assert model.head is not None and model.embed is not None and model.head.weight is model.embed.weight
    assert all(type(parameter) is nn.Parameter and parameter.dtype is torch.bfloat16 for parameter in parameters)
    (size,) = memory.sizes
    assert size < sum(parameter.nbytes + ALIGNED for parameter in parameters)
    base = min(parameter.data_ptr() for parameter in parameters)
    spans = sorted((parameter.data_ptr() - base, parameter.nbytes) for parameter in parameters)
    assert all(at % ALIGNED == 0 and at + length <= after for (at, length), (after, _) in itertools.pairwise(spans))
    first, second, *_ = parameters
    before = second._version
    with torch.no_grad():
        first.fill_(1.0)
    assert second._version == before, "to write one must not look to autograd as if all were written"


def test_each_piece_is_a_segment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator asks for multiples of 2 MiB from 20 MiB on, and cuts what is less from a larger one."""
    sizes: list[int] = []

    def empty(size: int, **_: Any) -> torch.Tensor:
        sizes.append(size)
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool: torch.no_grad())
    monkeypatch.setattr(torch, "empty", empty)
    memory = Transport(alone().group, CPU, SimpleNamespace())  # type: ignore[arg-type]
    for size in (1, 10 * SEGMENT, 10 * SEGMENT + 1):
        memory.piece(size)
    assert sizes == [10 * SEGMENT, 10 * SEGMENT, 11 * SEGMENT]
    memory._pool = None


def test_sent_and_summed_memory_stay_apart_after_a_failed_pass() -> None:
    memory = alone()
    memory.reserve(12)
    scatter = ReduceScatter(memory, torch.float32)
    ask = functools.partial(scatter.allocate, dtype=torch.bfloat16, device=CPU)
    asked = [ask((count,)).dtype for count in (12, 12, 8, 12, 6, 6, 3)]  # of the first and the third nothing more is heard
    assert asked == [torch.bfloat16] * 4 + [torch.float32, torch.bfloat16, torch.float32]


# The end.


class Pool:
    """Stands for a pool of memory."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Return a place for what waiting for the device does."""
    does: list[Callable[[], object]] = [lambda: None]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: does[0]())
    return does


def test_memory_goes_only_when_the_device_is_idle(waits: list[Callable[[], object]]) -> None:
    pool = Pool()
    there, seen = weakref.ref(pool), []
    waits[0] = lambda: seen.append(there() is not None)
    memory = Transport(alone().group, CPU, pool)  # type: ignore[arg-type]
    del pool
    assert not seen
    del memory
    gc.collect()
    assert seen == [True] and there() is None


@pytest.mark.parametrize("stuck", [True, False])
def test_memory_that_a_device_may_still_write_to_is_kept(
    waits: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch, stuck: bool
) -> None:
    never = threading.Event()

    def fail() -> None:
        raise RuntimeError("unspecified launch failure")

    waits[0] = never.wait if stuck else fail
    monkeypatch.setattr(transport, "PATIENCE", 0.05 if stuck else 60.0)
    pool = Pool()
    there, before = weakref.ref(pool), sys.getrefcount(pool)
    memory = Transport(alone().group, CPU, pool)  # type: ignore[arg-type]
    del memory
    gc.collect()
    never.set()
    assert sys.getrefcount(pool) > before
    del pool
    assert there() is not None


@pytest.mark.parametrize("well", [True, False])
def test_a_group_that_goes_first_forgets_the_memory(
    waits: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch, well: bool
) -> None:
    forgotten: list[object] = []

    def deregister(pool: object) -> None:
        if not well:
            raise RuntimeError("the group is aborted")
        forgotten.append(pool)

    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    group = SimpleNamespace(_get_backend=lambda device: SimpleNamespace(deregister_mem_pool=deregister))
    pool = Pool()
    memory = Transport(group, CPU, pool)  # type: ignore[arg-type]
    there = weakref.ref(memory)
    memory.close()
    assert forgotten == ([pool] if well else [])
    del memory
    gc.collect()
    assert (there() is None) is well


def closed(rank: int, world_size: int, fail: bool) -> list[bool]:
    layout = Layout.plan(ParallelConfig(zero=1), world_size)
    mesh = Mesh.connect(layout, CPU)
    there: list[bool] = []
    for each in (mesh, mesh.rearranged(layout).rearranged(layout)):  # as a run's first mesh, and its last stage's
        each.before_closing.append(lambda: there.append(dist.is_initialized()))
    if fail:
        each.before_closing.append(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            mesh.close()
    mesh.close()
    mesh.close()
    return [*there, dist.is_initialized()]


@pytest.mark.parametrize("fail", [False, True])
def test_actions_before_the_groups_go_are_done_once_for_all_stages(fail: bool) -> None:
    """Also where one of them fails: memory of the others is freed."""
    assert run_ranks(1, closed, fail) == [[True, True, False]]


# Ranks that may.


def chosen(rank: int, world_size: int, works: list[tuple[bool, bool, bool]]) -> list[tuple[bool, bool]]:
    """By what the last rank says of its machine, of the group and of the trial: whether copy engines are tried, and chosen."""
    mesh: Any = Mesh.connect(Layout.plan(ParallelConfig(zero=1), world_size), CPU)
    parallel, axes = ParallelConfig(zero=1), mesh.weight_axes["dense"]
    assert not choose_transport(mesh, axes, parallel).by_copy_engines, "there are none"
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda", 0), any=mesh.any, is_main=mesh.is_main)
    assert not choose_transport(on_gpu, axes, ParallelConfig(zero=1, copy_engines=False)).by_copy_engines
    found: list[tuple[bool, bool]] = []
    tried: list[Transport] = []

    def may(of: Mesh, axes: WeightAxes, good: bool) -> bool:
        return good or rank == 0

    def prepared(of: Mesh, axes: WeightAxes, good: bool) -> Transport:
        if not (good or rank == 0):
            raise RuntimeError("no memory of this kind")
        return reached(mesh, axes, parallel)

    def attempt(found: Transport, of: Mesh, axes: WeightAxes, good: bool) -> Transport:
        tried.append(found)
        if not (good or rank == 0):
            raise RuntimeError("something else arrived")
        return found

    for machine, group, trial in works:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transport, "_supports_copy_engines", functools.partial(may, good=machine))
            patch.setattr(transport, "_copy_engine_transport", functools.partial(prepared, good=group))
            patch.setattr(transport, "_verified", functools.partial(attempt, good=trial))
            by_engines = choose_transport(on_gpu, axes, parallel).by_copy_engines
        found.append((bool(tried), by_engines))
        tried.clear()
    return found


def test_all_use_copy_engines_or_nobody() -> None:
    cases = [(True, True, True), (False, True, True), (True, False, True), (True, True, False)]
    nobody, in_vain = (False, False), (True, False)  # a trial has collectives, for which all ranks must be there
    assert run_ranks(2, chosen, cases) == [[(True, True), nobody, nobody, in_vain]] * 2


def allowed(rank: int, world_size: int) -> list[bool]:
    """As it is; on two hosts; with an older NCCL; with a GPU out of reach; with a PyTorch that does not offer it."""
    mesh = Mesh.connect(Layout.plan(ParallelConfig(zero=1), world_size), CPU)
    found: list[bool] = []
    for at in range(5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transport, "nccl", SimpleNamespace(version=lambda at=at: (2, 27, 5) if at == 2 else (2, 28, 3)))
            patch.setattr(torch.cuda, "device_count", lambda: 2)
            patch.setattr(torch.cuda, "can_device_access_peer", lambda one, other, at=at: at != 3)
            offered = SimpleNamespace() if at == 4 else SimpleNamespace(NCCL_CTA_POLICY_ZERO=2)
            patch.setattr(dist, "ProcessGroupNCCL", offered, raising=False)
            if at == 1:
                patch.setattr(hosts, "host_name", lambda: f"host {rank}")
            anew = replace(mesh)  # asks for hosts again
            found.append(transport._supports_copy_engines(anew, anew.weight_axes["dense"]))
    return found


def test_copy_engines_need_peer_gpus_of_one_host_and_new_nccl() -> None:
    assert run_ranks(2, allowed) == [[True, False, False, False, False]] * 2


def tried(rank: int, world_size: int) -> list[bool]:
    """Return whether the trial is content: with a true transport, and with one that brings what was not sent."""
    mesh = Mesh.connect(Layout.plan(ParallelConfig(zero=1), world_size), CPU)
    exchange = dist.all_to_all_single

    def wrong(received: torch.Tensor, sent: torch.Tensor, **keys: Any) -> Any:
        work = exchange(received, sent, **keys)
        work.wait()
        received[0, 0] += 1
        return work

    found: list[bool] = []
    for way in (exchange, wrong):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_to_all_single", way)
            try:
                axes = mesh.weight_axes["dense"]
                transport._verified(reached(mesh, axes, ParallelConfig()), mesh, axes)
                found.append(True)
            except RuntimeError:
                found.append(False)
    return found


def test_a_trial_shows_what_does_not_arrive() -> None:
    assert run_ranks(2, tried) == [[True, False]] * 2


def cut_and_placed(rank: int, world_size: int) -> set[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "choose_transport", reached)
        engine = build(Work(ParallelConfig(zero=1, tp=2), precision="bf16"), world_size)
    kinds = {type(parameter).__name__ for parameter in engine.module.parameters()}
    return kinds if any(isinstance(parameter, DTensor) for parameter in engine.module.parameters()) else set()


def test_tensor_parallel_weights_stay_what_they_are() -> None:
    for kinds in run_ranks(2, cut_and_placed):
        assert "DTensor" in kinds or "Parameter" in kinds
