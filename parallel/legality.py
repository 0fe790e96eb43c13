"""Legality of a layout: what keeps it from running a model, checked before the start, and the nearest layouts that can.

Imports no torch. What only the built model can tell is checked by `capabilities.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..config.problems import Problem
from .config import CONTEXT_KINDS, ParallelConfig
from .context.sizes import context_problems
from .layout import layout_problems
from .pipeline.stages import SCHEDULES, schedule_of, stage_count
from .tensor.sizes import tensor_problems


@dataclass
class Work:
    """The work that a layout must run: the model's shape, the length of samples, and the settings of its blocks.

    vocabulary  None: not known before the data's tokenizer is
    experts     of each layer that is a mixture of them; 0: there is none
    recurrent   whether their routers share a recurrent cell
    """

    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocabulary: int | None
    seq_len: int
    activation: str = "none"
    compile: bool = False
    experts: int = 0
    recurrent: bool = False


def layout_and_model_problems(parallel: ParallelConfig, work: Work, world_size: int) -> list[Problem]:
    """List what keeps the torch engine from running this work in this layout on this many processes.

    Where there is a problem, the last one names the nearest layouts that can.
    """
    problems = list(_problems(parallel, work, world_size))
    if problems:
        near = near_layouts(parallel, work, world_size)
        if near:
            problems.append(Problem("parallel", "other layouts can run this work", f"nearest: {'; or '.join(near)}"))
    return problems


def is_legal(parallel: ParallelConfig, work: Work, world_size: int) -> bool:
    """Return whether the torch engine can run this work in this layout on this many processes."""
    return next(_problems(parallel, work, world_size), None) is None


def _problems(parallel: ParallelConfig, work: Work, world_size: int) -> Iterator[Problem]:
    sizes = layout_problems(parallel, world_size)
    if sizes:
        yield from sizes
        return
    yield from tensor_problems(work, parallel, work.seq_len)
    if work.experts and parallel.tp > 1 and not parallel.sequence_parallel:
        text = "a mixture of experts works on each rank's own tokens, and without it all ranks have the same"
        yield Problem("parallel.sequence_parallel", text, "set it to true, or use parallel.tp=1")
    yield from _expert_problems(parallel, work)
    yield from context_problems(work, parallel, work.seq_len)
    stages = list(_stage_problems(parallel, work.layers))
    yield from stages
    if parallel.pp > 1 and not stages:
        yield from _schedule_problems(parallel, work)


def _expert_problems(parallel: ParallelConfig, work: Work) -> Iterator[Problem]:
    experts = work.experts
    if parallel.ep > 1 and work.compile and work.activation == "selective":
        text = (
            "tokens travel between ranks inside a block, where the compiler pauses, and selective checkpointing allows no pause"
        )
        yield Problem("trainer.activation", text, "use none, full or offload, or trainer.compile=false, or parallel.ep=1")
    if parallel.ep > 1 and not experts:
        text = "the model has no mixture of experts whose experts ranks could share out"
        yield Problem("parallel.ep", text, "use parallel.ep=1, or give model.experts.count")
    elif experts % parallel.ep:
        fits = [n for n in range(1, experts + 1) if experts % n == 0]
        text = f"{experts} experts (model.experts.count) can't be dealt to {parallel.ep} ranks evenly"
        yield Problem("parallel.ep", text, f"use parallel.ep={' or '.join(map(str, fits))}")


def _stage_problems(parallel: ParallelConfig, layers: int) -> Iterator[Problem]:
    """Yield what is wrong with the pipeline's schedule, stages and their layers."""
    if parallel.schedule not in SCHEDULES or parallel.pp == 1:
        yield from parallel.problems_of("schedule", "stages_per_rank", "stage_layers")
        return
    chosen, per_rank = schedule_of(parallel), parallel.stages_per_rank
    if per_rank is not None and (per_rank < 1 or (chosen.fixed and per_rank != chosen.stages_per_rank)):
        told = f"exactly {chosen.stages_per_rank}" if chosen.fixed else "at least 1"
        message = f"{parallel.schedule} takes {told} per rank, not {per_rank}"
        other = "interleaved or zb" if chosen.fixed else "1f1b"
        fix = f"leave it null, or use parallel.schedule={other}"
        yield Problem("parallel.stages_per_rank", message, fix)
        return
    if parallel.schedule == "interleaved" and per_rank == 1:
        yield Problem("parallel.stages_per_rank", "one stage per rank has nothing to interleave", "use parallel.schedule=1f1b")
        return
    stages = stage_count(parallel)
    if stages > layers:
        most = layers // (stages // parallel.pp)
        fix = f"use parallel.pp={most} or less" if most else "use parallel.schedule=1f1b"
        yield Problem("parallel.pp", f"{layers} layers (model.layers) can't fill {stages} stages of {parallel.schedule}", fix)
    elif parallel.stage_layers is not None:
        given = list(parallel.stage_layers)
        if len(given) != stages:
            message = f"names {len(given)} stages, but {parallel.schedule} on {parallel.pp} ranks has {stages}"
            yield Problem("parallel.stage_layers", message, f"give {stages} numbers, or null to balance them by cost")
        elif min(given) < 1:
            yield Problem("parallel.stage_layers", f"{given} leaves a stage without a layer", "give every stage 1 or more")
        elif sum(given) != layers:
            message = f"{given} adds up to {sum(given)} layers, but model.layers={layers}"
            yield Problem("parallel.stage_layers", message, "make them add up, or null to balance them by cost")


def _schedule_problems(parallel: ParallelConfig, work: Work) -> Iterator[Problem]:
    """Yield what the schedule can't do with this work."""
    other = "use parallel.schedule=1f1b or interleaved"
    if schedule_of(parallel).splits_backward:
        halves = f"{parallel.schedule} runs the backward pass in two halves"
        if work.recurrent:
            message = f"{halves}, and torch can't do that with the cell that all layers of a recurrent router use"
            yield Problem("parallel.schedule", message, f"{other}, or model.experts.router=top_k")
        if work.compile:
            yield Problem("trainer.compile", f"{halves}, and compiled blocks can't", f"set it to false, or {other}")
        if work.activation == "full" and work.experts:
            message = f"{halves}, and a checkpoint that keeps the choice of experts allows one"
            yield Problem("trainer.activation", message, f"use none or offload, or {other}")
        if work.activation == "selective":
            message = f"{halves}, and selective checkpointing allows one"
            yield Problem("trainer.activation", message, f"use none, full or offload, or {other}")


def near_layouts(parallel: ParallelConfig, work: Work, world_size: int, most: int = 3) -> list[str]:
    """Return the overrides of the legal layouts nearest to an illegal one, nearest first; empty where none is legal.

    Distance: doublings of tp, pp, cp, replicate and ep, and 1 for every other key changed.
    """
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    legal: list[tuple[float, dict[str, str]]] = []
    for tp, pp, cp in itertools.product(divisors, repeat=3):
        if world_size % (tp * pp * cp):
            continue
        for candidate in _variants(replace(parallel, tp=tp, pp=pp, cp=cp), world_size // (tp * pp * cp), work.experts):
            if next(_problems(candidate, work, world_size), None) is None:
                legal.append((_distance(parallel, candidate), _changes(parallel, candidate)))
    chosen: list[dict[str, str]] = []
    for _, changes in sorted(legal, key=lambda found: found[0]):
        # Skip a layout that makes all the changes of a nearer one and more.
        if len(chosen) < most and not any(nearer.items() <= changes.items() for nearer in chosen):
            chosen.append(changes)
    return [" ".join(f"{key}={value}" for key, value in changes.items()) for changes in chosen]


def _variants(sized: ParallelConfig, data: int, experts: int) -> Iterator[ParallelConfig]:
    """Yield layouts of these sizes: as given, and with other values of the keys that may be in conflict."""
    dealt = math.gcd(sized.ep, experts, data * sized.cp * sized.tp) if experts and sized.ep > 0 else 1
    options: dict[str, list[Any]] = {
        "zero": [sized.zero if sized.zero in (0, 1, 2, 3) else 3],
        "replicate": [n for n in (sized.replicate, 1) if n > 0 and data % n == 0],
        "ep": [n for n in (sized.ep, dealt, 1) if n > 0],
        "schedule": [name for name in (sized.schedule, "1f1b", "interleaved", "gpipe") if name in SCHEDULES],
        "cp_kind": [kind for kind in (sized.cp_kind, "ring") if kind in CONTEXT_KINDS],
        "sequence_parallel": [sized.sequence_parallel, False],
        "stages_per_rank": [sized.stages_per_rank, None],
        "stage_layers": [sized.stage_layers, None],
    }
    if sized.pp == 1 and sized.schedule in SCHEDULES:
        options["schedule"] = [sized.schedule]
    if sized.cp == 1 and sized.cp_kind in CONTEXT_KINDS:
        options["cp_kind"] = [sized.cp_kind]
    if sized.tp == 1:
        options["sequence_parallel"] = [sized.sequence_parallel]
    distinct = [[value for at, value in enumerate(values) if value not in values[:at]] for values in options.values()]
    for values in itertools.product(*distinct):
        yield replace(sized, **dict(zip(options, values, strict=True)))


_SIZES = ("tp", "pp", "cp", "replicate", "ep")
_OTHERS = ("zero", "schedule", "cp_kind", "sequence_parallel", "stages_per_rank", "stage_layers")


def _distance(asked: ParallelConfig, given: ParallelConfig) -> float:
    sizes = sum(abs(math.log2(max(1, getattr(asked, key))) - math.log2(getattr(given, key))) for key in _SIZES)
    return sizes + sum(getattr(asked, key) != getattr(given, key) for key in _OTHERS)


def _changes(asked: ParallelConfig, given: ParallelConfig) -> dict[str, str]:
    """Return the overrides that turn one into the other."""

    def written(value: object) -> str:
        return "null" if value is None else str(value).lower()

    changed = [key for key in (*_SIZES, *_OTHERS) if getattr(asked, key) != getattr(given, key)]
    return {f"parallel.{key}": written(getattr(given, key)) for key in changed}
