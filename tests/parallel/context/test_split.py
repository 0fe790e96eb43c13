"""Context parallelism beside the parity table: slices, problems, evaluation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from meshloom.data.batch import MicroBatch
from meshloom.models.config import DecoderConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.context.sizes import context_problems
from meshloom.parallel.context.split import ContextParallel
from meshloom.parallel.context.zigzag import deal_pieces
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from support.parity import Work, build, sample
from support.ranks import run_ranks

TOLERANCE = 1e-9


def layout(cp: int, kind: str, **settings: object) -> ParallelConfig:
    return ParallelConfig(cp=cp, cp_kind=kind, **settings)  # type: ignore[arg-type]


def _evaluated(rank: int, size: int, work: Work) -> tuple[float, float]:
    engine = build(work, size)
    batches = [MicroBatch.collate([sample(index, work.documents) for index in (2, 3)])]
    loss = engine.evaluate(batches)
    return float(loss.total), float(loss.tokens)


def test_evaluation_counts_each_token_once() -> None:
    work = Work(layout(2, "ring"), documents=True)
    ((total, tokens),) = run_ranks(1, _evaluated, replace(work, parallel=ParallelConfig()))
    for got in run_ranks(2, _evaluated, work):
        assert got == (pytest.approx(total, rel=TOLERANCE), tokens)


def _slices(rank: int, size: int, kind: str, documents: bool) -> tuple[MicroBatch, torch.Tensor]:
    mesh = Mesh.connect(Layout(cp=size), torch.device("cpu"))
    part = ContextParallel(mesh, kind).cut(MicroBatch.collate([sample(index, documents) for index in (8, 9)]))
    return part.micro_batch, part.positions_BT


def _held(kind: str, whole: MicroBatch, member: int) -> torch.Tensor:
    """(B, T) positions of a member of two, in the rows laid end to end."""
    rows, length = whole.tokens_BS.shape
    eighth = length // 8
    order = [4 * member + part for part in range(4)] if kind == "ulysses" else [[0, 1, 6, 7], [2, 3, 4, 5]][member]
    if kind == "ring" and whole.documents is not None:
        pieces = deal_pieces(tuple(whole.documents.host_cu_seqlens.tolist()), length, 2)[member]
        spans = [torch.arange(piece.start, piece.start + piece.length) for piece in pieces]
        return torch.cat(spans).reshape(rows, -1)
    columns = torch.tensor([eighth * part + offset for part in order for offset in range(eighth)])
    return columns + length * torch.arange(rows)[:, None]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_slices_cover_a_micro_batch_and_know_their_positions(kind: str, documents: bool) -> None:
    whole = MicroBatch.collate([sample(index, documents) for index in (8, 9)])
    length = whole.tokens_BS.shape[1]
    if documents:
        assert whole.documents is not None
        at = whole.documents.positions()
    else:
        at = torch.arange(length).expand(2, -1)
    index_BS = torch.cat([_held(kind, whole, member) for member in range(2)], dim=1)
    parts = run_ranks(2, _slices, kind, documents)
    assert torch.equal(torch.cat([part.tokens_BS for part, _ in parts], dim=1), whole.tokens_BS.take(index_BS))
    assert torch.equal(torch.cat([part.targets_BS for part, _ in parts], dim=1), whole.targets_BS.take(index_BS))
    assert torch.equal(torch.cat([found for _, found in parts], dim=1), at.take(index_BS))
    for part, _ in parts:
        assert (part.documents is None) == (whole.documents is None)
        if part.documents is not None and whole.documents is not None:
            assert torch.equal(part.documents.cu_seqlens, whole.documents.cu_seqlens)
            assert (part.documents.part_cu_seqlens is not None) == (kind == "ring")


@pytest.mark.parametrize(
    ("config", "seq_len", "key", "says"),
    [
        (layout(2, "rings"), 16, "parallel.cp_kind", ["'rings'", "ring or ulysses"]),
        (layout(1, ""), 16, "parallel.cp_kind", ["ring or ulysses"]),
        (layout(2, "ring"), 18, "parallel.cp", ["18 positions", "4 equal parts", "data.seq_len=20"]),
        (layout(3, "ulysses"), 16, "parallel.cp", ["3 equal parts", "data.seq_len=18"]),
        (layout(4, "ulysses"), 16, "parallel.cp_kind", ["6 attention heads", "4 ranks", "ring", "1 or 2 or 3 or 6"]),
        (layout(2, "ulysses", ring_exchange="queries"), 16, "parallel.ring_exchange", ["ulysses", "leave it keys"]),
        (
            layout(4, "ring", ring_exchange="queries", ring_direct=3),
            16,
            "parallel.ring_exchange",
            ["4 members", "ring_direct=4"],
        ),
        (layout(2, "ulysses", tp=2), 16, "parallel.cp_kind", ["3 attention heads", "parallel.tp=2", "parallel.cp=1 or 3"]),
    ],
)
def test_a_run_that_cannot_be_cut_is_refused(config: ParallelConfig, seq_len: int, key: str, says: list[str]) -> None:
    shape = DecoderConfig(dim=48, layers=1, heads=6, kv_heads=3, ffn_dim=8)
    (problem,) = context_problems(shape, config, seq_len)
    assert problem.key == key
    for words in says:
        assert words in str(problem)


@pytest.mark.parametrize("config", [layout(1, "ring"), layout(4, "ring"), layout(2, "ulysses"), layout(3, "ulysses", tp=2)])
def test_a_run_that_can_be_cut_is_not_refused(config: ParallelConfig) -> None:
    shape = DecoderConfig(dim=48, layers=1, heads=6, kv_heads=3, ffn_dim=8)
    assert context_problems(shape, config, 48) == []
