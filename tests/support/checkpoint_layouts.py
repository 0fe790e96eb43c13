"""Hops between layouts: train on one, save, go on from there on another, save, go back, and compare what every hop holds.

    for result in matrix(draw_pairs(seed=0, count=6)):
        assert result.fault() is None

Hops of all pairs on the same number of processes share these, which saves starting them.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.folder import step_name
from meshloom.checkpoint.restore import restore
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.legality import Work, layout_and_model_problems
from meshloom.parallel.pipeline.stages import SCHEDULES
from support import parity
from support.ranks import run_ranks

READER = Path(__file__).resolve().parents[2] / "docs/read_checkpoint.py"
BEFORE, AFTER = 2, 2  # steps before the first save, and after each
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Place:
    """A layout on some processes. micro, activation: how the work is done there."""

    ranks: int
    parallel: ParallelConfig
    micro: int
    activation: str

    def __str__(self) -> str:
        p = self.parallel
        axes = [
            f"{name} {value}"
            for name, value in (("tp", p.tp), ("pp", p.pp), ("cp", p.cp), ("ep", p.ep), ("×", p.replicate))
            if value > 1
        ]
        kind = [p.schedule] * (p.pp > 1) + [p.cp_kind] * (p.cp > 1) + ["sp"] * (p.tp > 1 and p.sequence_parallel)
        return " ".join([f"{self.ranks}:", f"zero {p.zero}", *axes, *kind])


@dataclass(frozen=True)
class Pair:
    """From `here` to `there` and back, with one model and balance."""

    here: Place
    there: Place
    model: tuple[tuple[str, Any], ...]
    balance: tuple[tuple[str, Any], ...] = ()

    def work(self, place: Place) -> parity.Work:
        """Return the work that is trained at a place."""
        return parity.Work(
            place.parallel,
            place.micro,
            steps=BEFORE + AFTER,
            documents=True,
            activation=place.activation,
            model=self.model,
            balance=self.balance,
        )


@dataclass
class Result:
    """Losses of the three visits, and their saves."""

    pair: Pair
    folders: list[Path]
    losses: list[list[float]] = field(default_factory=list[list[float]])

    @property
    def difference(self) -> float:
        """Largest relative difference of any loss from those of a bare PyTorch loop."""
        expected = parity.plain_curve(self.pair.work(self.pair.here))[0]
        tails = [expected, expected[BEFORE:], expected[BEFORE:]]
        pairs = [
            (one, other) for mine, tail in zip(self.losses, tails, strict=True) for one, other in zip(mine, tail, strict=True)
        ]
        return max(abs(one - other) / abs(other) for one, other in pairs)

    def fault(self) -> str | None:
        """Return what is wrong, or None. The arrays are read by the second reader, with NumPy alone."""
        read = load_second_reader()
        first, *others = [read.Checkpoint(folder) for folder in self.folders]
        for other, where in zip(others, ("there", "back"), strict=True):
            if set(other.arrays) != set(first.arrays):
                return f"{where}: other arrays: {set(other.arrays) ^ set(first.arrays)}"
            if other.state != first.state:
                return f"{where}: other state"
            for key in first.arrays:
                one, two = first[key], other[key]
                if one.dtype != two.dtype or one.tobytes() != two.tobytes():
                    return f"{where}: {key} has other bits"
        return None if self.difference < TOLERANCE else f"the losses differ by {self.difference:.1e}"


def draw_pairs(seed: int, count: int, most_ranks: int = 8) -> list[Pair]:
    """Random pairs of legal layouts."""
    rng = random.Random(seed)
    pairs: list[Pair] = []
    while len(pairs) < count:
        model = (("layers", 8), ("kv_heads", rng.choice([1, 4])), ("tied", rng.random() < 0.5))
        here, there = _draw(rng, model, most_ranks), _draw(rng, model, most_ranks)
        if here != there:
            pairs.append(Pair(here, there, model))
    return pairs


def _draw(rng: random.Random, model: tuple[tuple[str, Any], ...], most_ranks: int) -> Place:
    while True:
        ranks = rng.choice([n for n in (1, 2, 4, 8) if n <= most_ranks])
        tp, pp, cp = (rng.choice([1, 1, 2, 4]) for _ in range(3))
        if ranks % (tp * pp * cp):
            continue
        data = ranks // (tp * pp * cp)
        parallel = ParallelConfig(
            tp=tp,
            pp=pp,
            cp=cp,
            zero=rng.randrange(4),
            replicate=rng.choice([n for n in (1, 2, 4) if data % n == 0]),
            schedule=rng.choice([*SCHEDULES]) if pp > 1 else "1f1b",
            cp_kind=rng.choice(["ring", "ulysses"]) if cp > 1 else "ring",
            sequence_parallel=rng.random() < 0.5,
        )
        place = Place(ranks, parallel, rng.choice([1, 2]), rng.choice(["none", "none", "selective", "full"]))
        work = parity.Work(parallel, place.micro, model=model)
        shape = work.llama()
        sizes = {key: shape[key] for key in ("layers", "heads", "kv_heads", "ffn_dim", "vocabulary")}
        asked = Work(**sizes, seq_len=parity.SEQ_LEN, activation=place.activation)
        if not layout_and_model_problems(parallel, asked, ranks):
            return place


@dataclass(frozen=True)
class _Visit:
    """One stay at a place: come from a save or begin, save, train on."""

    name: str
    work: parity.Work
    source: Path | None
    target: Path


def _visits(rank: int, world_size: int, visits: Sequence[_Visit]) -> list[list[float]]:
    """Body for `run_ranks`: the losses of each visit."""
    found: list[list[float]] = []
    for visit in visits:
        try:
            found.append(_visit(rank, world_size, visit))
        except BaseException as error:
            error.add_note(f"in {visit}")
            raise
    return found


def _visit(rank: int, world_size: int, visit: _Visit) -> list[float]:
    engine = parity.build(visit.work, world_size)
    control = Control(rank, world_size, engine.mesh.store(visit.name))
    losses: list[float] = []
    if visit.source is None:
        losses += [parity.step(engine, visit.work, number)[0] for number in range(BEFORE)]
    else:
        engine.prepare_restore()
        state = restore(visit.source, list(engine.fragments()), control, timeout=60).state
        engine.load_counters(state["counters"])
    checkpointer = Checkpointer(visit.target, control, CheckpointConfig(mode="sync", timeout=60))
    checkpointer.save(BEFORE, engine.fragments(), {"counters": engine.counters()}, required=True)
    checkpointer.finish()
    return losses + [parity.step(engine, visit.work, number)[0] for number in range(BEFORE, BEFORE + AFTER)]


def matrix(pairs: Sequence[Pair], folder: Path, timeout: float = 150.0) -> Iterator[Result]:
    """Do all pairs, with their saves under a folder."""
    results = [
        Result(pair, [folder / f"{number}-{stay}" / step_name(BEFORE) for stay in range(3)])
        for number, pair in enumerate(pairs)
    ]
    for stay in range(3):
        places = [result.pair.there if stay == 1 else result.pair.here for result in results]
        visits: list[_Visit] = []
        for number, (result, place) in enumerate(zip(results, places, strict=True)):
            source = result.folders[stay - 1] if stay else None
            visits.append(_Visit(f"{number}-{stay}", result.pair.work(place), source, result.folders[stay].parent))
        for ranks in sorted({place.ranks for place in places}):
            chosen = [number for number, place in enumerate(places) if place.ranks == ranks]
            losses = run_ranks(ranks, _visits, [visits[number] for number in chosen], timeout=timeout)
            for at, number in enumerate(chosen):
                assert all(rank[at] == losses[0][at] or np.allclose(rank[at], losses[0][at], rtol=1e-12) for rank in losses)
                results[number].losses.append(losses[0][at])
    yield from results


def load_second_reader() -> Any:
    """Return the module `docs/read_checkpoint.py`, which reads a checkpoint with NumPy alone."""
    spec = importlib.util.spec_from_file_location("read_checkpoint", READER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
