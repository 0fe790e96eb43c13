"""The gradient moments that batch-size controllers decide from: the same numbers on every layout, and the right ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from meshloom.data.batch import GlobalBatch, MicroBatch
from meshloom.models.init import fill
from meshloom.optim.batch.statistics import GradientStatistics
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.gradient_noise import GradientNoise, Measure
from meshloom.parallel.hybrid.cost import CostModel
from meshloom.parallel.hybrid.share import BatchDocuments, HybridAssigner
from meshloom.parallel.layout import Layout
from meshloom.parallel.limits import measuring_problems
from support.models import decoder
from support.parity import SEQ_LEN, UnevenSamples, Work, build, global_tokens, sample, share
from support.ranks import run_ranks

WORK = Work(micro=2, samples=16)


def measured(rank: int, world_size: int, work: Work, measure: Measure) -> GradientStatistics | None:
    engine = build(work, world_size, measures=True)
    mesh = engine.mesh
    for asked in (Measure.NOTHING, measure):  # a step that isn't measured leaves nothing behind for the next
        mine = share(mesh, work, 0, by_worker=asked is not Measure.NOTHING)
        tokens = global_tokens(mesh, mine)
        engine.accumulate(mine, tokens, asked)
        engine.gradient_norm()
        found = engine.gradient_moments(work.samples)
        engine.zero_grad()
    return None if found is None else found.read()


def oracle(work: Work) -> GradientStatistics:
    """From the whole gradient of every micro-batch, in one process, by autograd alone."""
    model = decoder(**work.llama()).double()
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        fill(parameter.data, model.initial(name), seed=7, name=name, global_shape=shape, offsets=(0,) * len(shape))
    parts: list[torch.Tensor] = []
    tokens: list[int] = []
    for start in range(0, work.samples, work.micro):
        indices = range(start, min(start + work.micro, work.samples))
        batch = MicroBatch.collate([sample(index, work.documents) for index in indices])
        logits = model(batch.tokens_BS, None, batch.documents)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        parts.append(torch.cat([gradient.flatten() for gradient in gradients]))
        tokens.append(batch.valid_tokens)
    whole = sum(parts, torch.zeros(())) / sum(tokens)
    shares = torch.tensor(tokens, dtype=torch.float64) / sum(tokens)
    means = [part / count for part, count in zip(parts, tokens, strict=True)]  # g_j
    squares = torch.stack([mean.square().sum() for mean in means])
    products = torch.stack([mean @ whole for mean in means])
    return GradientStatistics(
        float((shares * squares).sum()),
        float(whole.square().sum()),
        len(parts),
        work.samples / len(parts),
        float((shares * products.square()).sum()),
    )


LAYOUTS = [
    *[(ranks, ParallelConfig(zero=zero)) for ranks in (1, 2, 4) for zero in (0, 1, 2, 3)],
    *[(8, ParallelConfig(zero=zero, replicate=2)) for zero in (1, 3)],
    (2, ParallelConfig(tp=2)),
    (4, ParallelConfig(tp=2, zero=1, sequence_parallel=False)),
    (2, ParallelConfig(pp=2, schedule="1f1b")),
    (2, ParallelConfig(pp=2, schedule="zb", zero=2)),
    (8, ParallelConfig(pp=2, tp=2, zero=3)),
    *[(2, ParallelConfig(cp=2, zero=zero)) for zero in (0, 1, 2, 3)],
    (2, ParallelConfig(cp=2, cp_kind="ulysses")),
    (4, ParallelConfig(cp=4, zero=1)),
    (4, ParallelConfig(cp=2, zero=3)),
    (4, ParallelConfig(cp=2, tp=2, zero=2)),
    (8, ParallelConfig(cp=2, pp=2, schedule="zb", zero=1)),
]


def title(value: object) -> str:
    if isinstance(value, Work):
        return f"{title(value.parallel)}-rows{value.parallel.hdp_tokens}-samples{value.samples}"
    if isinstance(value, ParallelConfig):
        cut = f"cp{value.cp}-{value.cp_kind}-tp{value.tp}-pp{value.pp}-{value.schedule}"
        return f"zero{value.zero}-rep{value.replicate}-{cut}"
    return str(value)


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS, ids=title)
def test_squares_are_those_of_whole_micro_batch_gradients(ranks: int, parallel: ParallelConfig) -> None:
    expected = oracle(WORK)
    model = (("layers", 4),) if parallel.pp > 1 else ()
    work = replace(WORK, parallel=parallel, model=model)
    if model:
        expected = oracle(work)
    for found in run_ranks(ranks, measured, work, Measure.SQUARES):
        assert found.workers == expected.workers and found.worker_samples == expected.worker_samples
        assert found.worker_square == pytest.approx(expected.worker_square, rel=1e-9)
        assert found.batch_square == pytest.approx(expected.batch_square, rel=1e-9)
        assert found.projection_square is None


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, ParallelConfig(zero=3)),
        (2, ParallelConfig(zero=0)),
        (4, ParallelConfig(zero=3)),
        (2, ParallelConfig(pp=2)),
        (4, ParallelConfig(cp=2, zero=1)),
    ],
    ids=title,
)
def test_projections_are_products_with_the_whole_gradient(ranks: int, parallel: ParallelConfig) -> None:
    work = replace(WORK, parallel=parallel)
    expected = oracle(work)
    for found in run_ranks(ranks, measured, work, Measure.PROJECTIONS):
        assert found.projection_square == pytest.approx(expected.projection_square, rel=1e-9)


def numbers_kept(rank: int, world_size: int, work: Work) -> tuple[int, int]:
    """Numbers of workers' gradients that a rank copies to the host in a measured step, and those of its weights."""
    engine, copy, kept = build(work, world_size, measures=True), torch.Tensor.to, list[int]()

    def copied(tensor: torch.Tensor, *arguments: Any, **keys: Any) -> torch.Tensor:
        kept.extend([tensor.numel()] if arguments[0] == "cpu" and tensor.is_floating_point() else [])
        return copy(tensor, *arguments, **keys)

    mine = share(engine.mesh, work, 0, by_worker=True)
    tokens = global_tokens(engine.mesh, mine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", copied)
        engine.accumulate(mine, tokens, Measure.PROJECTIONS)
        engine.gradient_norm()
    return sum(kept), sum(weight.numel() for weight in engine.module.parameters())


def test_ranks_that_share_a_worker_keep_a_piece_of_its_gradient_each() -> None:
    work = replace(WORK, parallel=ParallelConfig(cp=2, zero=0))
    found = run_ranks(2, numbers_kept, work)
    workers = WORK.samples // WORK.micro
    assert sum(kept for kept, _ in found) == workers * found[0][1]


def in_another_order(rank: int, world_size: int, work: Work) -> str:
    """The message of a measured step in which one rank computes two gradients of one shape in another order."""
    watch = GradientNoise.watch
    swapped = [f"layers.0.attention.{name}.weight" for name in ("wq", "wo")]

    def watch_other(noise: GradientNoise, name: str, weight: torch.nn.Parameter) -> None:
        watch(noise, swapped[1 - swapped.index(name)] if name in swapped else name, weight)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 3:
            patch.setattr(GradientNoise, "watch", watch_other)
        with pytest.raises(RuntimeError) as caught:
            measured(rank, world_size, work, Measure.SQUARES)
    return str(caught.value)


def test_ranks_whose_sums_would_be_of_different_weights_are_named() -> None:
    for said in run_ranks(4, in_another_order, replace(WORK, parallel=ParallelConfig(cp=2, zero=0))):
        assert "ranks 2 and 3 compute the gradients of weights in different orders" in said


UNEVEN = [
    *[(ranks, ParallelConfig(zero=zero)) for ranks in (1, 2, 3) for zero in (0, 1, 3)],
    (2, ParallelConfig(tp=2)),
    (2, ParallelConfig(pp=2, schedule="1f1b")),
    (4, ParallelConfig(pp=2, schedule="interleaved")),
    (4, ParallelConfig(cp=2, zero=3)),
]


@pytest.mark.parametrize(("ranks", "parallel"), UNEVEN, ids=title)
def test_blanks_are_no_workers(ranks: int, parallel: ParallelConfig) -> None:
    """Seven samples in micro-batches of two: the fourth worker has one sample, and other micro-batches have none."""
    work = replace(WORK, samples=7, parallel=parallel, model=(("layers", 4),))
    expected = oracle(work)
    for found in run_ranks(ranks, measured, work, Measure.SQUARES):
        assert found.workers == expected.workers == 4 and found.worker_samples == 7 / 4
        assert found.worker_square == pytest.approx(expected.worker_square, rel=1e-9)
        assert found.batch_square == pytest.approx(expected.batch_square, rel=1e-9)


def test_blanks_have_no_projection() -> None:
    work = replace(WORK, samples=7, parallel=ParallelConfig(zero=3))
    expected = oracle(work)
    for found in run_ranks(3, measured, work, Measure.PROJECTIONS):
        assert found.projection_square == pytest.approx(expected.projection_square, rel=1e-9)


def hybrid(tokens: int, samples: int, model: tuple[Any, ...] = (), **parallel: Any) -> Work:
    config = ParallelConfig(hdp="greedy", hdp_tokens=tokens, **parallel)
    return Work(config, micro=2, samples=samples, documents=True, model=(("layers", 4), *model))


EXPERTS = (("experts", {"count": 8, "top_k": 2, "ffn_dim": 7, "shared": 1}),)
HYBRID = [
    (2, 1, 1, hybrid(32, 8, zero=1)),  # nothing is sent
    (2, 2, 1, hybrid(19, 8, zero=0)),
    (2, 2, 2, hybrid(9, 3, zero=2)),
    (3, 3, 1, hybrid(12, 5, zero=3)),
    (4, 2, 2, hybrid(16, 7, zero=1, ring_direct=1)),
    (4, 2, 1, hybrid(17, 16, EXPERTS, zero=3, replicate=2)),
    (4, 2, 2, hybrid(16, 6, zero=1, tp=2)),
    (4, 2, 1, hybrid(17, 8, pp=2, zero=0, schedule="interleaved")),
    (4, 2, 2, hybrid(9, 5, pp=2, zero=3, schedule="zb")),
    (4, 1, 1, hybrid(60, 8, pp=2, zero=1)),  # rows of measured steps are shorter
]
"""Ranks, how many of them share a worker, the most of its rows on one of them, and what is measured."""


@pytest.mark.parametrize(("ranks", "sharers", "rows", "work"), HYBRID, ids=title)
def test_workers_whose_documents_are_dealt_by_cost(ranks: int, sharers: int, rows: int, work: Work) -> None:
    expected = oracle(work)
    assigner = HybridAssigner.of(work.parallel, Layout.plan(work.parallel, ranks), 2 * SEQ_LEN, CostModel(10.0, 100.0))
    documents = BatchDocuments.of(UnevenSamples(work.documents), GlobalBatch(0, work.samples))
    plan = assigner.plan_by_worker(documents, SEQ_LEN, work.micro)
    turns = [each.turns for each in plan.groups]
    assert plan.groups[0].ranks == sharers
    assert max(Counter(own)[turn] for own in turns for turn in own if turn is not None) == rows
    measure = Measure.SQUARES if work.parallel.tp > 1 else Measure.PROJECTIONS
    for found in run_ranks(ranks, measured, work, measure):
        assert found.workers == expected.workers and found.worker_samples == expected.worker_samples
        assert found.worker_square == pytest.approx(expected.worker_square, rel=1e-9)
        assert found.batch_square == pytest.approx(expected.batch_square, rel=1e-9)
        if measure is Measure.PROJECTIONS:
            assert found.projection_square == pytest.approx(expected.projection_square, rel=1e-9)


def test_tied_embedding_counts_once() -> None:
    work = replace(WORK, parallel=ParallelConfig(zero=3), model=(("tied", True),))
    expected = oracle(work)
    for found in run_ranks(2, measured, work, Measure.SQUARES):
        assert found.worker_square == pytest.approx(expected.worker_square, rel=1e-9)


def test_one_worker_can_not_be_told_apart() -> None:
    work = replace(WORK, micro=16, parallel=ParallelConfig(zero=0))
    assert run_ranks(1, measured, work, Measure.SQUARES) == [None]


@pytest.mark.parametrize(
    ("parallel", "tied", "projections", "key_word"),
    [
        (ParallelConfig(pp=2), True, False, "tied"),
        (ParallelConfig(tp=2), False, True, "projections"),
        (ParallelConfig(engine="deepspeed"), False, True, "deepspeed"),
    ],
)
def test_layouts_that_hide_the_numbers_are_refused(
    parallel: ParallelConfig, tied: bool, projections: bool, key_word: str
) -> None:
    (problem,) = measuring_problems(parallel, tied, projections)
    assert key_word in str(problem) and problem.fix
    assert measuring_problems(ParallelConfig(), tied, projections) == []
