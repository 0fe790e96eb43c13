"""Masters that exist only during an update: beside fp32 ones, and equal in every bit on layouts with equal gradients.

They are saved by `Checkpointer`, restored under ZeRO-1, tensor and expert parallelism, and compared in NumPy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.folder import step_name
from meshloom.checkpoint.restore import restore
from meshloom.kernels.random_bits import random_bits
from meshloom.kernels.rounding import split_in_two
from meshloom.optim.build import build_optimizer
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig, LionConfig, OptimConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import Engine, OptimizerFactory
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.trainer.resume import restore_weights
from support.checkpoint_layouts import load_second_reader
from support.models import decoder
from support.parity import Work, take_steps
from support.ranks import run_ranks
from support.settings import settings_of

WORK = Work(samples=8, micro=4, precision="bf16", max_norm=None)
ZERO_0, LION = ParallelConfig(zero=0), LionConfig(lr=0.01)
STEP = 1e-5  # a fiftieth of the spacing of bf16 numbers about 0.07


def engine_of(
    parallel: ParallelConfig,
    world_size: int,
    masters: str,
    config: OptimConfig,
    work: Work = WORK,
    seed: int = 7,
    make: OptimizerFactory | None = None,
) -> Engine:
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**work.llama())
    settings = settings_of(model, parallel, precision="bf16", seed=seed, masters=masters)
    return make_engine(model, mesh, make or functools.partial(build_optimizer, config), parallel, settings)


def weights(engine: Engine) -> torch.Tensor:
    held = [each.tensor.flatten().double() for each in engine.fragments() if each.role in ("weight", "weight_remainder")]
    half = len([each for each in engine.fragments() if each.role == "weight_remainder"])
    return torch.cat(held) if not half else torch.cat(held[half:]) + torch.cat(held[:half])


def moved(rank: int, world_size: int, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
    """By kind of masters, how far steps of equal size have moved each weight; and the losses."""
    found: dict[str, torch.Tensor] = {}
    for kind in kinds:
        engine = engine_of(ZERO_0, world_size, kind, LionConfig(lr=STEP, weight_decay=0.0))
        before = weights(engine).clone()
        take_steps(engine, replace(WORK, lr=STEP, steps=20), range(20))
        found[kind] = weights(engine) - before
        stored = [parameter.tensor for parameter in engine.weights.local.values()]  # type: ignore[attr-defined]
        sizes = {weight.untyped_storage().size() for weight in stored}
        assert (sizes == {0}) == (kind != "full"), "masters have memory during updates alone"
    return found


def test_steps_below_the_spacing_are_not_lost() -> None:
    (found,) = run_ranks(1, moved, ["full", "bf16_stochastic", "bf16_kahan"])
    full, chance, kahan = (found[kind] for kind in ("full", "bf16_stochastic", "bf16_kahan"))
    assert float(full.abs().mean()) > 3 * STEP
    # Gradients differ by rounding, and now and then their signs: most weights have moved alike.
    assert float((kahan - full).abs().median()) < STEP and abs(float((kahan * full).sum() / (full * full).sum()) - 1) < 0.2
    assert abs(float((chance * full).sum() / (full * full).sum()) - 1) < 0.3


def bits(rank: int, world_size: int, kind: str) -> list[dict[str, torch.Tensor]]:
    """The weights after steps under ZeRO-0, under ZeRO-1, and under ZeRO-0 with a new engine in the middle."""
    found: list[dict[str, torch.Tensor]] = []
    config = AdamWConfig(lr=0.01, fused=False)
    for zero, resumed in ((0, False), (1, False), (0, True)):
        parallel = ParallelConfig(zero=zero)
        engine = engine_of(parallel, world_size, kind, config)
        take_steps(engine, WORK, range(2))
        if resumed:
            fresh = engine_of(parallel, world_size, kind, config)
            fresh.prepare_restore()
            saved = {each.key: each.tensor.clone() for each in engine.fragments()}
            for fragment in fresh.fragments():
                fragment.tensor.copy_(saved[fragment.key])
            fresh.load_counters(engine.counters())
            engine = fresh
        take_steps(engine, WORK, range(2, 4))
        counted = engine.counters().get("roundings")
        assert counted == (5 if kind == "bf16_stochastic" else None), "the initial values' rounding, and each update's"
        whole = {}
        for each in engine.fragments():
            if each.role == "weight":
                whole[each.name] = torch.zeros(each.global_shape, dtype=torch.bfloat16)
                whole[each.name][each.box.slices()] = each.tensor
                if zero:
                    torch.distributed.all_reduce(whole[each.name])
        found.append(whole)
    return found


def test_bits_are_equal_on_zero_0_and_1_and_after_a_restore() -> None:
    for kind in ("bf16_stochastic", "bf16_kahan"):
        for first, *others in run_ranks(2, bits, kind):
            for other in others:
                assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


class InPlace(AdamW):
    """AdamW that updates what is kept in the place of masters, as a kernel of a GPU does, by PyTorch's operations."""

    fused_step = rounded_step = True
    updates, taken = 0, frozenset[torch.dtype]()

    def step(self, closure: Any = None) -> None:
        kept, self.kept = self.kept or {}, None
        gradients = {weight: weight.grad for group in self.param_groups for weight in group["params"]}
        self.taken |= {gradient.dtype for gradient in gradients.values()}
        for weight, gradient in gradients.items():
            weight.grad = gradient.float()
        for weight, held in kept.items():
            assert not weight.untyped_storage().size(), "masters have no memory"
            weight.untyped_storage().resize_(weight.numel() * 4)
            weight.data.copy_(held.value.float() if held.remainder is None else held.value.float() + held.remainder.float())
        torch.optim.AdamW.step(self)
        for weight, held in kept.items():
            if held.remainder is not None:
                split_in_two(weight.data, held.value, held.remainder)
            else:
                at = torch.arange(weight.numel()).view(weight.shape)
                index = held.box.first + at // held.box.length * held.box.stride + at % held.box.length
                drawn = (random_bits(held.key, index) & 0xFFFF).int()
                held.value.copy_(((weight.data.view(torch.int32) + drawn) & ~0xFFFF).view(torch.float32))
            weight.untyped_storage().resize_(0)
        self.updates += bool(kept)


def in_place(rank: int, world_size: int, kind: str) -> list[tuple[torch.Tensor, Any]]:
    """Weights and counters after steps, with masters and without, on two layouts and after a restore's preparation."""
    found: list[tuple[torch.Tensor, Any]] = []
    for parallel in (ParallelConfig(zero=1), ParallelConfig(zero=1, tp=2)):
        for optimizer in (AdamW, InPlace):
            config = AdamWConfig(lr=0.01, fused=False)
            engine = engine_of(parallel, world_size, kind, config, make=functools.partial(optimizer, config))
            engine.prepare_restore()
            prepared: Any = engine.optimizer  # type: ignore[attr-defined]
            if optimizer is InPlace:
                assert prepared.updates == 1 and prepared.taken == {torch.bfloat16}, "as in training: no masters, no fp32"
            engine.load_counters({name: 3.0 if name == "roundings" else 0.0 for name in engine.counters()})
            for number in range(3):
                update(engine, number)
            found.append((weights(engine), engine.counters()))
            assert optimizer is AdamW or prepared.updates == 4
    return found


def test_an_update_without_masters_has_their_bits() -> None:
    for kind in ("bf16_stochastic", "bf16_kahan"):
        for ranks in run_ranks(2, in_place, kind):
            for with_masters, without in zip(*[iter(ranks)] * 2, strict=True):
                assert torch.equal(with_masters[0], without[0]) and with_masters[1] == without[1]


MIXTURE = replace(WORK, model=(("experts", {"count": 4, "top_k": 2, "ffn_dim": 6}),))
LAYOUTS = [ParallelConfig(zero=1), ParallelConfig(zero=1, tp=2), ParallelConfig(zero=1, ep=2)]


def update(engine: Engine, number: int) -> None:
    """Take an update with gradients that are a function of the place in the whole weight: the same on every layout."""
    for name, weight in engine.weights.local.items():  # type: ignore[attr-defined]
        draw = torch.Generator().manual_seed(number * 1000 + len(name))
        whole = torch.randn(weight.placed.global_shape, generator=draw)
        weight.tensor.grad = whole[weight.placed.box.slices()].clone()
    engine.update(0.01)
    engine.zero_grad()


def save(engine: Engine, folder: Path, name: str) -> None:
    control = Control(engine.mesh.rank, engine.mesh.layout.world_size, engine.mesh.store(name))
    checkpointer = Checkpointer(folder, control, CheckpointConfig(mode="sync", timeout=60))
    checkpointer.save(1, engine.fragments(), {"counters": engine.counters()}, required=True)
    checkpointer.finish()


def moves(rank: int, world_size: int, kinds: Sequence[str], folder: Path) -> None:
    """Save under the first layout, and go on under each: the next save must be the same in every bit."""
    for kind in kinds:
        engine = engine_of(LAYOUTS[0], world_size, kind, LION, MIXTURE)
        update(engine, 0)
        update(engine, 1)
        save(engine, folder / kind, f"{kind}-begun")
        for number, parallel in enumerate(LAYOUTS):
            engine = engine_of(parallel, world_size, kind, LION, MIXTURE, seed=8)
            control = Control(rank, world_size, engine.mesh.store(f"{kind}-{number}"))
            engine.prepare_restore()
            state = restore(folder / kind / step_name(1), list(engine.fragments()), control, timeout=60).state
            engine.load_counters(state["counters"])
            update(engine, 2)
            save(engine, folder / f"{kind}-{number}", f"{kind}-{number}-after")


def arrays(folder: Path) -> dict[str, bytes]:
    read = load_second_reader().Checkpoint(folder / step_name(1))
    return {key: read[key].tobytes() for key in read.arrays}


def test_bits_are_equal_on_other_layouts_after_a_save(tmp_path: Path) -> None:
    kinds = ("bf16_stochastic", "bf16_kahan")
    run_ranks(2, moves, kinds, tmp_path)
    for kind in kinds:
        first, *others = (arrays(tmp_path / f"{kind}-{number}") for number in range(len(LAYOUTS)))
        assert first != arrays(tmp_path / kind)
        for other in others:
            assert {key for key in first if first[key] != other[key]} == set() == first.keys() ^ other.keys()


def imports(rank: int, world_size: int, folder: Path) -> None:
    """Weights that come without remainders are themselves, under each kind: nothing of the initial ones is added."""
    stored = engine_of(ZERO_0, world_size, "full", LION)
    save(stored, folder, "stored")
    for kind in ("full", "bf16_stochastic", "bf16_kahan"):
        engine = engine_of(ZERO_0, world_size, kind, LION, seed=8)
        restore_weights(engine, engine.mesh, folder / step_name(1))
        engine.load_counters({})  # as a run does whose checkpoint has no number of roundings
        expected = weights(stored) if kind == "full" else weights(stored).bfloat16().double()
        assert torch.equal(weights(engine), expected), kind


def test_imported_weights_get_no_remainder(tmp_path: Path) -> None:
    run_ranks(1, imports, tmp_path)
