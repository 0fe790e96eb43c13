"""Count what Muon's matrices of a 70B model send on thousands of ranks, directly and in levels, and time the plan of a rank.

    python benchmarks/matrix_exchange.py [ranks=64,512,4096,16384] [tp=8] [per_host=8]

This process plays the rank that owns most elements and the last one, with the real plan; nothing is sent. Seconds are of the
processor, and say nothing of a network.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch

from meshloom.models.config import DecoderConfig
from meshloom.optim.optimizers.newton_schulz_forms import cost
from meshloom.optim.optimizers.parameters import NamedParameter, matrices_of, number_waves
from meshloom.parallel.exchange_levels import exchange_levels
from meshloom.parallel.matrix_plan import MatrixPlan
from meshloom.parallel.routes import Hop, place
from meshloom.planner.parameters import ParameterShape, decoder_inventory

MODEL = DecoderConfig(dim=8192, layers=80, heads=64, kv_heads=8, ffn_dim=28672, vocabulary=128256)
BYTES = 2  # of an element that travels: bf16


def boxes_of(parameters: list[ParameterShape], ranks: int, tp: int) -> np.ndarray:
    """The boxes of all ranks, (ranks, parameters, 4): cut over tensor-parallel ranks, and then along rows over the others."""
    table = np.zeros((ranks, len(parameters), 4), dtype=np.int64)
    data, of_tp = np.arange(ranks) // tp, np.arange(ranks) % tp
    for number, each in enumerate(parameters):
        rows, columns = each.local_shape(tp)
        piece = -(-rows // (ranks // tp))
        start = np.minimum(data * piece, rows)
        table[:, number, 0] = start + (rows * of_tp if each.cut_dim == 0 else 0)
        table[:, number, 1] = columns * of_tp if each.cut_dim == 1 else 0
        table[:, number, 2] = np.minimum(piece, rows - start)
        table[:, number, 3] = columns
    return table


def traffic(rank: int, levels: tuple[int, ...], hops: list[Hop], sizes: np.ndarray, per_host: int) -> tuple[int, int, float]:
    """Messages that a rank sends and receives in some hops, and bytes that it receives from other hosts."""
    sent = received = 0
    away = 0.0
    for hop in hops:
        me, stride = int(place(np.asarray(rank), levels, hop.level)), int(np.prod(levels[: hop.level]))
        sent += len(set(hop.to.tolist()) - {me})
        received += len(set(hop.came_from.tolist()) - {me})
        hosts = (rank + (hop.came_from - me) * stride) // per_host
        away += float(sizes[hop.receive][hosts != rank // per_host].sum()) * BYTES
    return sent, received, away


def main(argv: list[str]) -> None:
    """Print a row for each number of ranks and way."""
    given = dict(word.split("=", 1) for word in argv)
    tp, per_host = int(given.get("tp", "8")), int(given.get("per_host", "8"))
    shapes = [each for each in decoder_inventory(MODEL).parameters if each.hidden]
    matrices = matrices_of([NamedParameter(each.name, torch.empty(0), each.shape, hidden=True) for each in shapes])
    spans = [(number, 0, *each.shape) for number, each in enumerate(matrices)]
    print("ranks, levels, waves | owner: sends, receives, MB from other hosts | last rank: the same | plan, s")
    for ranks in map(int, given.get("ranks", "64,512,4096,16384").split(",")):
        boxes = boxes_of(shapes, ranks, tp)
        for kind in ("direct", "auto"):
            seconds = 0.0
            levels = exchange_levels([rank // per_host for rank in range(ranks)], kind)
            begun = time.process_time()
            plan = MatrixPlan.of(spans, boxes, cost, levels)
            numbers = number_waves(matrices, plan.owners)
            found: list[tuple[Any, ...]] = []
            owned = np.bincount(plan.owners, [each.shape[0] * each.shape[1] for each in matrices])
            for rank in (int(owned.argmax()), ranks - 1):
                waves = list(plan.waves(rank, numbers))
                seconds = time.process_time() - begun if not found else seconds
                hops = [hop for wave in waves for hop in (*wave.gather, *wave.scatter)]
                found.append(traffic(rank, levels, hops, plan.parts.sizes, per_host))
            told = " | ".join(f"{sent}, {received}, {away / 1e6:.0f}" for sent, received, away in found)
            print(f"{ranks}, {' × '.join(map(str, levels))}, {max(numbers) + 1} | {told} | {seconds:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
