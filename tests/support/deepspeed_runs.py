"""Runs under the DeepSpeed engine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.zero.muon.original_muon
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
import torch

from meshloom.parallel.box import Box
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.deepspeed.settings import DeepSpeedConfig
from meshloom.parallel.engine import Engine
from support.parity import Work, build, step

Arrays = dict[str, list[tuple[tuple[int, ...], Box, torch.Tensor]]]


def ds(zero: int, **settings: object) -> ParallelConfig:
    return ParallelConfig(engine="deepspeed", zero=zero, **settings)  # type: ignore[arg-type]


def zeros(zero: int, **keys: object) -> ParallelConfig:
    """With keys of DeepSpeed's own zero_optimization."""
    return ds(zero, deepspeed=DeepSpeedConfig(config={"zero_optimization": keys}))


def snapshot(engine: Engine) -> Arrays:
    """Copies of this rank's boxes."""
    arrays: Arrays = {}
    for fragment in engine.fragments():
        arrays.setdefault(fragment.key, []).append((fragment.global_shape, fragment.box, fragment.tensor.clone()))
    return arrays


def whole(ranks: list[Arrays]) -> dict[str, torch.Tensor]:
    """The global arrays behind all ranks' boxes; every element must be there, and the same wherever it is held twice."""
    arrays: dict[str, torch.Tensor] = {}
    for held in ranks:
        for key, boxes in held.items():
            for shape, box, tensor in boxes:
                array = arrays.setdefault(key, torch.full(shape, torch.nan))
                there = array[box.slices()]
                assert torch.equal(there[~there.isnan()], tensor[~there.isnan()]), f"{key}: copies differ"
                array[box.slices()] = tensor
    assert not any(array.isnan().any() for array in arrays.values())
    return arrays


def write(engine: Engine, arrays: dict[str, torch.Tensor], counters: dict[str, float]) -> None:
    """Write arrays and counters into an engine, as a restore does."""
    engine.prepare_restore()
    for fragment in engine.fragments():
        fragment.tensor.copy_(arrays[fragment.key][fragment.box.slices()])
    engine.load_counters(counters)


def leg(
    rank: int, world_size: int, work: Work, arrays: dict[str, torch.Tensor] | None, counters: dict[str, float]
) -> tuple[Arrays, Arrays, dict[str, float], list[float]]:
    """Some steps from given arrays (None: from the start): the state before and after, and the losses."""
    engine = build(work, world_size)
    if arrays is not None:
        write(engine, arrays, counters)
    before = snapshot(engine)
    losses = [step(engine, work, number)[0] for number in range(work.first_step, work.first_step + work.steps)]
    return before, snapshot(engine), engine.counters(), losses


def asynchronous_io_is_built() -> bool:
    """Return whether async_io is already compiled here for this very DeepSpeed; compiling it takes minutes."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    package = importlib.util.find_spec("deepspeed")
    home = str(Path(str(package.origin)).parent) if package is not None else ""
    plans = [library.parent / "build.ninja" for library in root.rglob("async_io*.so")]
    return any(plan.exists() and home in plan.read_text() for plan in plans)
