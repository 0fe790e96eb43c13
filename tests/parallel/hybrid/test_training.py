"""Hybrid data parallelism through the trainer's own loop, in float64: losses, norms and gradients of a bare loop.

`PYTHONPATH=tests python tests/parallel/hybrid/test_training.py 40` tries as many random layouts, lengths and sizes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from meshloom.data.batch import GlobalBatch
from meshloom.parallel import on_host
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.hybrid.assignment import HybridAssignment
from meshloom.parallel.hybrid.cost import CostModel
from meshloom.parallel.hybrid.hidden_copies import HiddenCopies
from meshloom.parallel.hybrid.share import BatchDocuments, HybridAssigner
from meshloom.parallel.layout import Layout
from meshloom.parallel.pipeline.stages import SCHEDULES
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.loop import Loop, PlansDiffer
from support.parity import SEQ_LEN, UnevenSamples, Work, build, differences, take_steps
from support.ranks import run_ranks

TOLERANCE = 1e-9


def work(
    tokens: int,
    samples: int = 5,
    documents: bool = True,
    model: tuple[Any, ...] = (),
    balance: tuple[Any, ...] = (),
    **parallel: Any,
) -> Work:
    config = ParallelConfig(hdp="greedy", hdp_tokens=tokens, **parallel)
    return Work(config, micro=2, samples=samples, steps=2, documents=documents, lr=2e-3, model=model, balance=balance)


WINDOW = (("layer_types", ["sliding", "full"]), ("sliding_window", 3), ("sinks", True))
EXPERTS = (("experts", {"count": 8, "top_k": 2, "ffn_dim": 7, "shared": 1}),)
PRICES = (("global_batch", 0.5), ("counts", "exact"), ("z_loss", 0.1))
LAYOUTS = [(2, 1, 1, 1), (3, 1, 1, 1), (4, 1, 1, 1), (4, 2, 1, 1), (4, 1, 2, 1), (4, 1, 1, 2), (4, 2, 1, 4), (4, 1, 2, 2)]
"""Ranks, tp, pp and ep of random cases."""
CASES = {
    2: [
        work(8, zero=1, model=EXPERTS, balance=PRICES),
        work(8, zero=0, hdp_costs="measured", ring_direct=1),
        work(9, zero=1),
        replace(work(8, zero=2, model=(("layers", 4),)), hidden=HiddenCopies(CostModel(0.1, 1.0), 1.0, rate=1.5)),
        work(8, zero=1, model=WINDOW),
        work(8, zero=3, samples=3),
        work(8, zero=1, ring_exchange="queries", model=(("kv_heads", 4),)),
    ],
    3: [
        work(6, zero=1, samples=1, documents=False),  # nothing is left unshared
        work(7, zero=1, samples=3, ring_direct=2),  # rings of two and of three
        work(6, zero=1, model=WINDOW),
        work(7, zero=1, samples=3, ring_exchange="queries", model=WINDOW),
    ],
    4: [
        work(8, samples=3, zero=1, tp=2),  # a pass is slow here: of three samples there are four
        work(5, zero=3, replicate=2, ring_direct=1),
        work(8, zero=1, ep=4, model=EXPERTS, balance=PRICES),
        work(8, samples=3, zero=2, ep=2, tp=2, model=EXPERTS),
        work(8, pp=2, zero=1, ring_direct=1),
        work(5, zero=3, ring_exchange="queries"),
        work(9, pp=2, zero=3, schedule="interleaved", model=(("layers", 4), *WINDOW)),
        work(12, pp=2, zero=0, schedule="zbv", model=(("layers", 4),)),
        work(8, pp=2, zero=2, ep=2, model=EXPERTS, balance=PRICES),
    ],
}


def plan_of(case: Work, ranks: int) -> HybridAssignment:
    lengths = BatchDocuments.of(UnevenSamples(case.documents), GlobalBatch(0, case.samples)).lengths
    layout = Layout.plan(case.parallel, ranks)
    return HybridAssigner.of(case.parallel, layout, 2 * SEQ_LEN, CostModel(10.0, 100.0)).plan(lengths, SEQ_LEN, 2)


def test_cases_share_documents() -> None:
    plans = {ranks: [plan_of(case, ranks) for case in cases] for ranks, cases in CASES.items()}
    assert all(plan.shared for cases in plans.values() for plan in cases)
    assert not any(row.whole for rows in plans[3][0].rows for row in rows)
    assert {each.ranks for each in plans[3][1].shared} == {2, 3}


@pytest.mark.parametrize("ranks", CASES)
def test_losses_and_gradients_are_those_of_one_process(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_host, "SMALL", 0)
    for case, found in zip(CASES[ranks], differences(ranks, CASES[ranks], timeout=100.0), strict=True):
        assert found.worst < TOLERANCE, (case.parallel, found)


class RingWaits(Hook):
    """Keeps the seconds that ranks waited for their rings."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        self.steps.append([each.ring_wait for each in loop.work])


def ring_waits(rank: int, world_size: int, cases: list[Work]) -> list[list[list[float]]]:
    found = [RingWaits() for _ in cases]
    for hook, case in zip(found, cases, strict=True):
        take_steps(build(case, world_size), case, range(2), hook)
    return [hook.steps for hook in found]


def test_waiting_for_rings_is_told_of_every_rank() -> None:
    cases = [work(8, zero=1), Work(ParallelConfig(cp=2)), Work(ParallelConfig(zero=1))]
    shared, cut, whole = run_ranks(2, ring_waits, cases, timeout=60.0)[0]
    assert all(wait > 0 for wait in (*shared[1], *cut[1])) and whole[1] == [0.0, 0.0]  # a row has those of the step before


def differing(rank: int, world_size: int) -> str:
    case = work(8 + rank, zero=1)
    try:
        take_steps(build(case, world_size), case, range(1))
    except PlansDiffer as problem:
        return str(problem)
    return "nothing was noticed"


def test_plans_that_differ_are_named_before_a_message() -> None:
    for told in run_ranks(2, differing, timeout=60.0):
        assert told.startswith("step 1: rank 1 deals the batch's documents in another way")


def main(count: int) -> None:
    """Try random cases, and print the worst differences."""
    random = Random(count)
    for _ in range(count):
        ranks, tp, pp, ep = random.choice(LAYOUTS)
        zero, samples = random.randrange(4), random.randrange(1, 9)
        schedule = random.choice(sorted(SCHEDULES)) if pp > 1 else "1f1b"
        tokens = random.randrange(-(-SEQ_LEN // (ranks // (tp * pp))) + tp, 34)
        model = (*random.choice([(), WINDOW]), *(EXPERTS if ep > 1 else ()), ("layers", 4))
        more = {"zero": zero, "tp": tp, "pp": pp, "ep": ep, "schedule": schedule, "ring_direct": random.randrange(1, 5)}
        more["ring_exchange"] = random.choice(["keys", "queries"])
        case = work(tokens, samples=samples, model=model, **more)
        (found,) = differences(ranks, [case], timeout=100.0)
        layout = f"{ranks} ranks, tp {tp}, pp {pp} ({schedule}), ep {ep}, ZeRO-{zero}"
        print(f"{layout}, {samples} samples, rows of {tokens}: {found.worst:.1e}", flush=True)
        assert found.worst < TOLERANCE


if __name__ == "__main__":
    main(int(sys.argv[1]))
