"""Simulate steps whose documents are dealt statically, or by cost to runs of ranks: time over a bound that none can beat.

    python benchmarks/hybrid_balance.py [draw=docs/pictures/hybrid_balance.png]

A step has 4 rows of 32K tokens a rank. Quadratic and linear cost are equal at 45.6K tokens (a model like Llama 8B); a row costs
as much as 512 tokens. Rows of a rank are run one after another, and ranks meet at the end of the step (ZeRO-0 and 1). No
messages are charged. Documents longer than the ranks can hold are cut, for both. `static` groups as many ranks as the longest
document needs, and cuts every document over its group by itself, which is better than a zig-zag of rows.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from random import Random

from arguments import read
from document_lengths import QUANTILES, draw_length

from meshloom.parallel.hybrid.cost import CostModel, least_time
from meshloom.parallel.hybrid.planning import assign

CAPACITY = 32 * 1024
COSTS = CostModel(quadratic=1 / 45_600, linear=1.0, row=512.0)
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096)


@dataclass
class Settings:
    """draw: file of a picture; steps: simulated for each point; most: ranks at most."""

    draw: str = ""
    steps: int = 2
    most: int = 1024


def simulate(name: str, ranks: int, steps: int) -> tuple[float, float, float, float]:
    """Return time over bound of `static` and `greedy`, the documents of a step, and the seconds of planning greedily."""
    random = Random(ranks)
    static = greedy = bound = seconds = documents = 0.0
    for _ in range(steps):
        lengths: list[int] = []
        room = 4 * CAPACITY * ranks
        while room > 0:
            lengths.append(min(draw_length(name, random), ranks * CAPACITY, room))
            room -= lengths[-1]
        began = time.perf_counter()
        plan = assign(lengths, ranks, CAPACITY, COSTS)
        seconds += time.perf_counter() - began
        greedy += plan.step_time(lengths, COSTS)
        static += assign(lengths, ranks, CAPACITY, COSTS, "static").step_time(lengths, COSTS)
        bound += least_time(lengths, ranks, CAPACITY, COSTS)
        documents += len(lengths)
    return static / bound, greedy / bound, documents / steps, seconds / steps


def main(settings: Settings) -> None:
    """Print a table, and draw it where a file is named."""
    curves: dict[str, list[tuple[int, float, float]]] = {}
    print("| Lengths | Ranks | Documents | Static | Greedy | Gain | Planning, s |")
    print("|---" * 7 + "|")
    for name in QUANTILES:
        for ranks in RANKS:
            if ranks <= settings.most:
                static, greedy, documents, seconds = simulate(name, ranks, settings.steps)
                curves.setdefault(name, []).append((ranks, static, greedy))
                figures = f"{documents:,.0f} | {static:.3f} | {greedy:.3f} | {static / greedy:.2f} | {seconds:.2f}"
                print(f"| {name} | {ranks} | {figures} |", flush=True)
    if settings.draw:
        draw(curves, settings.draw)


def draw(curves: dict[str, list[tuple[int, float, float]]], path: str) -> None:
    """Draw time over bound against the number of ranks, `static` dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        ranks, static, greedy = zip(*points, strict=True)
        axes.plot(ranks, static, "--", color=f"C{number}")
        axes.plot(ranks, greedy, color=f"C{number}", label=name)
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="time of a step over the bound")
    axes.set_xticks([point[0] for point in next(iter(curves.values()))], [str(p[0]) for p in next(iter(curves.values()))])
    axes.set_yticks([1, 1.5, 2, 3, 4, 6], ["1", "1.5", "2", "3", "4", "6"])
    axes.legend(title="greedy; dashed: static")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(read(Settings(), sys.argv[1:]))
