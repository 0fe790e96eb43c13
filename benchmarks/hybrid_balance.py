"""Simulate steps whose documents are dealt statically, or by cost to runs of ranks: time over a bound that none can beat.

    python benchmarks/hybrid_balance.py [draw=docs/pictures/hybrid_balance.svg]
    python benchmarks/hybrid_balance.py stages=4          each rank is the first of a pipeline of four, with 16 rows
    python benchmarks/hybrid_balance.py equal_at=29212 row_tokens=326       costs that packed_documents.py has measured
    python benchmarks/hybrid_balance.py worker=4          steps whose gradient's noise is measured, of workers of four rows

A step has 4 rows of 32K tokens a rank. Quadratic and linear cost are equal at 45.6K tokens (a model like Llama 8B), and a
row costs as much as 512 tokens, unless they are given. Ranks that share a document wait for one another. All wait at the end
of the step (ZeRO-0 and 1), or after each row (in lock-step: ZeRO-2 and 3). No messages are charged. Documents longer than
the ranks can hold are cut, for all. `static` groups as many ranks as the longest document needs, and cuts every document
over its group by itself, which is better than a zig-zag of rows.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from arguments import read
from document_lengths import QUANTILES, draw_length

from meshloom.data.assignment import any_number
from meshloom.parallel.hybrid.assignment import HybridAssignment, in_lockstep
from meshloom.parallel.hybrid.by_worker import deal_by_worker, deal_worker
from meshloom.parallel.hybrid.cost import CostModel, least_time
from meshloom.parallel.hybrid.greedy import pack_rows
from meshloom.parallel.hybrid.pipelined import filled
from meshloom.parallel.hybrid.planning import assign

CAPACITY = 32 * 1024
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass
class Settings:
    """draw: file of a picture; least, most: ranks of the points; stages: of a pipeline for each rank.

    equal_at    length of a document whose quadratic and linear costs are equal
    row_tokens  that cost as much as beginning a row
    worker      rows that hold the tokens of a worker of measured steps; 0: steps are not measured
    """

    draw: str = ""
    least: int = 8
    most: int = 1024
    stages: int = 1
    worker: int = 0
    equal_at: int = 45_600
    row_tokens: int = 512

    @property
    def costs(self) -> CostModel:
        """Costs in tokens of linear cost."""
        return CostModel(quadratic=1 / self.equal_at, linear=1.0, row=float(self.row_tokens))


@dataclass
class Point:
    """Times of a step over the bound, its documents, and the seconds of planning it."""

    static: float = 0.0
    greedy: float = 0.0
    static_lockstep: float = 0.0
    lockstep: float = 0.0
    documents: int = 0
    seconds: float = 0.0


def draw_step(name: str, ranks: int, rows: int) -> list[int]:
    """Draw the documents of a step of so many rows a rank."""
    random = Random(ranks)
    lengths: list[int] = []
    room = rows * CAPACITY * ranks
    while room > 0:
        lengths.append(min(draw_length(name, random), ranks * CAPACITY, room))
        room -= lengths[-1]
    return lengths


def simulate(name: str, ranks: int, costs: CostModel) -> Point:
    """Simulate one step."""
    lengths = draw_step(name, ranks, 4)
    bound = least_time(lengths, ranks, CAPACITY, costs)
    began = time.process_time()
    greedy = assign(lengths, ranks, CAPACITY, costs)
    seconds = time.process_time() - began
    static = assign(lengths, ranks, CAPACITY, costs, "static")
    together = in_lockstep(static), assign(lengths, ranks, CAPACITY, costs, "lockstep")
    over = [plan.step_time(lengths, costs) / bound for plan in (static, greedy, *together)]
    return Point(over[0], over[1], over[2], over[3], len(lengths), seconds)


def print_pipelines(settings: Settings) -> None:
    """Print a table for pipelines of `stages` ranks, each with 16 rows of the tokens."""
    print("| Lengths | Pipelines | Documents | Rows | Time over the bound | Planning, s |")
    print("|---" * 6 + "|")
    costs = filled(settings.costs, CAPACITY)
    for name in QUANTILES:
        for ranks in (each for each in RANKS if settings.least <= each <= settings.most):
            lengths = draw_step(name, ranks, 16)
            began = time.process_time()
            plan = assign(lengths, ranks, CAPACITY, costs, stages=settings.stages)
            seconds = time.process_time() - began
            slowest = costs.row + costs.document(max(lengths)) / ranks
            bound = (least_time(lengths, ranks, CAPACITY, costs) + (settings.stages - 1) * slowest) / settings.stages
            over = plan.step_time(lengths, costs) / bound
            print(f"| {name} | {ranks} | {len(lengths):,} | {plan.passes} | {over:.3f} | {seconds:.2f} |", flush=True)


def print_measured(settings: Settings) -> None:
    """Print a table of steps dealt worker by worker. Documents are packed into samples, each of which is a worker."""
    print("| Lengths | Ranks | Workers | Ranks of a worker | Rows of it | Greedy | measured | Lock-step | measured |")
    print("|---" * 9 + "|")
    length, costs = settings.worker * CAPACITY, settings.costs

    def deal(lengths: Sequence[int], ranks: int) -> HybridAssignment:
        return assign(lengths, ranks, CAPACITY, costs, "lockstep")

    def deal_own(lengths: Sequence[int], ranks: int) -> HybridAssignment:
        return deal_worker(lengths, ranks, CAPACITY, costs)

    for name in QUANTILES:
        for ranks in (each for each in RANKS if settings.least <= each <= settings.most):
            lengths = [min(each, length) for each in draw_step(name, ranks, 4)]
            workers = pack_rows(range(len(lengths)), lengths, length)
            measured = deal_by_worker(lengths, costs.documents(lengths), workers, ranks, CAPACITY, deal_own, any_number)
            rows = sum(turn is not None for each in measured.groups for turn in each.turns) / len(workers)
            apart = replace(measured.plan, lockstep=False)
            plans = assign(lengths, ranks, CAPACITY, costs), apart, deal(lengths, ranks), measured.plan
            bound = least_time(lengths, ranks, CAPACITY, costs)
            over = " | ".join(f"{plan.step_time(lengths, costs) / bound:.3f}" for plan in plans)
            print(f"| {name} | {ranks} | {len(workers)} | {measured.groups[0].ranks} | {rows:.2f} | {over} |", flush=True)


def main(settings: Settings) -> None:
    """Print a table, and draw it where a file is named."""
    if settings.worker:
        print_measured(settings)
        return
    if settings.stages > 1:
        print_pipelines(settings)
        return
    curves: dict[str, list[tuple[int, Point]]] = {}
    print("| Lengths | Ranks | Documents | Static | Greedy | Static, lock-step | Lock-step | Planning, s |")
    print("|---" * 8 + "|")
    for name in QUANTILES:
        for ranks in RANKS:
            if ranks <= settings.most and ranks >= settings.least:
                found = simulate(name, ranks, settings.costs)
                curves.setdefault(name, []).append((ranks, found))
                times = (found.static, found.greedy, found.static_lockstep, found.lockstep)
                figures = " | ".join(f"{one:.3f}" for one in times)
                print(f"| {name} | {ranks} | {found.documents:,} | {figures} | {found.seconds:.2f} |", flush=True)
    if settings.draw:
        draw(curves, settings.draw)


def draw(curves: dict[str, list[tuple[int, Point]]], path: str) -> None:
    """Draw time over bound against the number of ranks, `static` dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        ranks = [size for size, _ in points]
        axes.plot(ranks, [point.static for _, point in points], "--", color=f"C{number}")
        axes.plot(ranks, [point.greedy for _, point in points], color=f"C{number}", label=name)
        axes.plot(ranks, [point.lockstep for _, point in points], ":", color=f"C{number}")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="time of a step over the bound")
    axes.set_xticks([point[0] for point in next(iter(curves.values()))], [str(p[0]) for p in next(iter(curves.values()))])
    axes.set_yticks([1, 1.5, 2, 3, 4, 6], ["1", "1.5", "2", "3", "4", "6"])
    axes.legend(title="greedy; dotted: lock-step; dashed: static")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(read(Settings(), sys.argv[1:]))
