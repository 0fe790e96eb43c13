"""Tensor and sequence parallelism beside the parity table: what is cut, logits, clear refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from meshloom.kernels.documents import Documents
from meshloom.optim.optimizers.parameters import NamedParameter
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.tensor.placements import apply_tensor_parallelism, stream_dim
from meshloom.parallel.tensor.sizes import tensor_problems
from support.models import decoder
from support.parity import VOCABULARY, Work, build
from support.ranks import run_ranks


def work(**settings: Any) -> Work:
    return Work(ParallelConfig(**settings))


def gathered(rank: int, world_size: int, case: Work) -> bool:
    engine = build(case, world_size)
    shards = engine.weights.shards
    for name, placed in engine.weights.placed.items():
        whole = torch.arange(torch.Size(placed.global_shape).numel()).view(placed.global_shape)
        parameter = NamedParameter(name, placed.parameter, placed.global_shape)
        assert torch.equal(shards.gather(parameter, shards.scatter(parameter, whole)), whole), name
    return True


def test_rows_cut_by_two_axes_unevenly_are_gathered() -> None:
    assert all(run_ranks(8, gathered, work(tp=4, zero=3)))


def logits(rank: int, world_size: int, shape: tuple[int, int], documents: bool) -> tuple[torch.Tensor, torch.Tensor]:
    model = decoder(**work().llama()).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
        tokens = torch.randint(0, VOCABULARY, shape, generator=generator)
        borders = Documents.of((torch.arange(shape[1]) // 3).expand(shape)) if documents else None
        expected = model(tokens, None, borders)
        apply_tensor_parallelism(model, init_device_mesh("cpu", (world_size,)), sequence_parallel=True)
        return model(tokens, None, borders), expected


@pytest.mark.parametrize(("shape", "documents"), [((1, 8), False), ((4, 7), False), ((3, 8), True)])
def test_logits_are_those_of_the_whole_model(shape: tuple[int, int], documents: bool) -> None:
    for found, expected in run_ranks(4, logits, shape, documents):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def bytes_held(rank: int, world_size: int) -> dict[str, int]:
    engine = build(work(tp=world_size), world_size)
    held = {name: placed.box.numel for name, placed in engine.weights.placed.items()}
    dist.barrier()
    return held


def test_matrices_are_cut_and_only_norms_and_shared_heads_repeat() -> None:
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in decoder(**work().llama()).named_parameters()}
    held = run_ranks(4, bytes_held)
    for name, size in sizes.items():
        copies = 4 if name.endswith(("norm.weight", "wk.weight", "wv.weight")) else 1
        assert sum(rank[name] for rank in held) == copies * size, name


SHAPE = {"heads": 12, "kv_heads": 4, "ffn_dim": 96, "vocabulary": 1000}


@pytest.mark.parametrize(
    ("changes", "parallel", "seq_len", "keys", "said"),
    [
        ({}, {"tp": 1}, 15, [], ""),
        ({}, {"tp": 4}, 16, [], ""),
        ({"kv_heads": 2}, {"tp": 4}, 16, [], ""),
        ({"vocabulary": None}, {"tp": 2}, 16, [], ""),
        ({}, {"tp": 5}, 20, ["parallel.tp", "parallel.tp"], "12 attention heads"),
        ({}, {"tp": 6}, 18, ["parallel.tp"], "4 key/value heads"),
        ({"ffn_dim": 94}, {"tp": 4}, 16, ["parallel.tp"], "model.ffn_dim=94"),
        ({"vocabulary": 9}, {"tp": 4}, 16, ["parallel.tp"], "vocabulary of 9"),
        ({}, {"tp": 4}, 18, ["parallel.sequence_parallel"], "18 positions"),
        ({}, {"tp": 4, "cp": 2}, 36, ["parallel.sequence_parallel"], "18 positions"),
        ({}, {"tp": 4, "sequence_parallel": False}, 18, [], ""),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(
    changes: dict[str, Any], parallel: dict[str, Any], seq_len: int, keys: list[str], said: str
) -> None:
    problems = tensor_problems(SimpleNamespace(**{**SHAPE, **changes}), ParallelConfig(**parallel), seq_len)
    assert [problem.key for problem in problems] == keys
    assert not keys or said in problems[0].message
    assert all("use " in problem.fix for problem in problems)


def test_the_stream_is_cut_between_sequences_where_it_can_be() -> None:
    assert [stream_dim(*sizes) for sizes in ((4, 7, 2), (3, 8, 2), (3, 7, 2))] == [0, 1, None]
