"""Kernels that span several modules of a block: their operators, on a CPU with plain torch in the kernels' place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from meshloom.kernels import norm, swiglu
from meshloom.models.block import Block
from meshloom.models.decoder import Decoder
from meshloom.models.protocol import BlockKernels
from meshloom.parallel.activation import apply_policies
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import EngineSettings
from meshloom.parallel.layout import Layout
from meshloom.parallel.pipeline.stages import schedule_of
from meshloom.parallel.policies import fused_swiglu_blocker
from meshloom.parallel.torch import assembly, engine
from support.compiling import counted_graphs
from support.models import decoder
from support.parity import Work, curves
from support.ranks import run_ranks
from support.stand_in_kernels import stand_in


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels' names in the order of their calls."""
    return stand_in(monkeypatch)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_feed_forward_is_the_formula() -> None:
    torch.manual_seed(0)
    leaves = [drawn(5, 8), drawn(12, 8), drawn(12, 8), drawn(8, 12)]
    x, w1, w3, w2 = leaves
    gradient = torch.randn(5, 8, dtype=torch.float64)
    plain = (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    fused = swiglu.FusedSwiglu()(x, w1, w3, w2)
    torch.testing.assert_close(fused, plain, rtol=1e-13, atol=1e-13)
    found, expected = (torch.autograd.grad(y, leaves, gradient) for y in (fused, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_feed_forward_keeps_gate_and_up_alone() -> None:
    x, w1, w3, w2 = drawn(5, 8), drawn(12, 8), drawn(12, 8), drawn(8, 12)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        swiglu.FusedSwiglu()(x, w1, w3, w2)
    assert sorted(kept) == sorted([(5, 8), (12, 8), (12, 8), (5, 24), (8, 12)])


def test_norm_adds_the_products_gradients_and_the_residuals() -> None:
    torch.manual_seed(0)
    x, weight = drawn(2, 3, 8), drawn(8)
    gradients = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(4)]
    y = F.rms_norm(x, (8,), weight, 1e-3)
    outputs = norm.FusedNorm()(x, weight, 1e-3, 3)
    assert torch.equal(outputs[0], x) and all(torch.equal(output, y) for output in outputs[1:])
    found = torch.autograd.grad(outputs, (x, weight), gradients)
    expected = torch.autograd.grad((x * 1, y, y * 1, y + 0), (x, weight), gradients)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def model(dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(1)
    made = decoder(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=96, vocabulary=50, mup_residual=0.5).to(dtype)
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.1)
    return made


def passed(built: Decoder) -> list[torch.Tensor]:
    """Loss and gradients."""
    inputs, targets = torch.randint(50, (2, 2, 16), generator=torch.Generator().manual_seed(2)).unbind()
    loss = built(inputs, targets)
    return [loss.detach(), *torch.autograd.grad(loss, list(built.parameters()))]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", ["none", "selective", "full", "offload"])
def test_a_model_of_fused_blocks_is_the_plain_one(policy: str, compiled: bool, calls: list[str]) -> None:
    dtype = torch.float32 if compiled else torch.float64  # torch 2.11 can't compile attention in fp64
    expected = passed(model(dtype))
    assert not calls
    built = model(dtype)
    blocks = list(built.layers.values())
    for block in blocks:
        assert isinstance(block, Block)
        block.use_kernels(BlockKernels(norm=norm.FusedNorm(), swiglu=None if policy == "selective" else swiglu.FusedSwiglu()))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if compiled else {"rtol": 1e-11, "atol": 1e-12}
    with counted_graphs("aot_eager_decomp_partition") as counter:
        apply_policies(blocks, [policy] * 2, compiled=compiled)
        torch.testing.assert_close(passed(built), expected, **tolerance)
    assert (counter.frame_count > 0) == compiled
    assert calls.count("norm_backward_rows") == 4
    assert calls.count("gemm_gated") == {"none": 2, "selective": 0, "full": 4, "offload": 2}[policy]
    assert calls.count("gemm_dgated") == (0 if policy == "selective" else 2)


LAYOUTS = {
    **{f"pp 2, {schedule}": ParallelConfig(pp=2, schedule=schedule) for schedule in ("1f1b", "zb", "zbv", "dualpipev")},
    **{f"ZeRO-{zero}": ParallelConfig(zero=zero) for zero in (1, 3)},
    "cp 2": ParallelConfig(cp=2),
}


def fused_and_plain(rank: int, world_size: int) -> dict[str, tuple[Any, Any, set[str]]]:
    """By layout: the curves of plain blocks, of fused ones, and which kernels ran."""
    found: dict[str, tuple[Any, Any, set[str]]] = {}
    for name, parallel in LAYOUTS.items():
        work = Work(parallel, 2, steps=2, lr=2e-3, model=(("layers", 4), ("tied", True)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(norm.FusedNorm, "fits", lambda *_: False)
            plain = curves(rank, world_size, work)
        with pytest.MonkeyPatch.context() as patch:
            made = stand_in(patch)
            patch.setattr(engine, "fuses_swiglu", lambda *_: True)
            found[name] = plain, curves(rank, world_size, work), set(made)
    return found


def test_fused_blocks_train_as_plain_ones_in_every_layout() -> None:
    for rank in run_ranks(2, fused_and_plain):
        for name, (plain, fused, made) in rank.items():
            assert [*fused[0], *fused[1]] == pytest.approx([*plain[0], *plain[1]], rel=1e-11), name
            parallel = LAYOUTS[name]
            halves = parallel.pp > 1 and schedule_of(parallel).splits_backward
            assert made == (set() if halves else {"gemm_gated", "gemm_dgated", "norm_backward_rows"}), name


@pytest.mark.parametrize(
    ("change", "policy", "fused", "swiglu_too"),
    [
        ({}, "none", True, True),
        ({}, "full", True, True),
        ({}, "selective", True, False),
        ({"float8": "tensorwise"}, "none", True, False),
        ({"precision": "fp32"}, "none", True, False),
    ],
)
def test_where_blocks_may_be_fused(
    change: dict[str, str], policy: str, fused: bool, swiglu_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiglu, "unsupported_reason", lambda _: None)
    monkeypatch.setattr(assembly, "use_float8", lambda *_: None)
    parallel = ParallelConfig()
    mesh: Any = SimpleNamespace(
        layout=Layout.plan(parallel, 1), device=torch.device("cuda"), rank=0, is_main=True, any=lambda flag: flag
    )
    built = model()
    settings = EngineSettings(policies=(policy,) * 2, **{"precision": "bf16", **change})  # type: ignore[arg-type]
    fuse = assembly.fuses_swiglu(built, mesh, parallel, settings)
    assembly.parallelize_stage(built, mesh, None, parallel, settings, fuse_swiglu=fuse, fuse_experts=False)
    for block in built.layers.values():
        assert isinstance(block, Block)
        assert (block.fused_norm is not None, block.ffn.swiglu is not None) == (fused, swiglu_too)


@pytest.mark.parametrize(("rank", "own"), [(0, None), (1, "it is wrong by 1"), (0, "it needs a Hopper GPU")])
def test_no_rank_fuses_if_one_can_not(
    rank: int, own: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="meshloom")
    monkeypatch.setattr(swiglu, "unsupported_reason", lambda _: own)
    mesh: Any = SimpleNamespace(device=torch.device("cuda"), rank=rank, is_main=rank == 0, any=lambda _: True)
    settings = EngineSettings(seed=0, precision="bf16")
    assert not assembly.fuses_swiglu(model(), mesh, ParallelConfig(), settings)
    assert (own or "another rank can't") in caplog.text and ("rank 1" in caplog.text) is (rank == 1)


def test_deepspeed_runs_blocks_as_they_are() -> None:
    settings = EngineSettings(seed=0, precision="bf16")
    for name, plain in (("torch", False), ("deepspeed", True)):
        assert (fused_swiglu_blocker(model().config, ParallelConfig(engine=name), settings) is not None) is plain


@pytest.mark.parametrize("wrong", [False, True])
def test_kernels_are_tried_before_they_are_used(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert swiglu._error(torch.device("cpu")) < 0.01
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(swiglu, "_error", lambda _: 0.1 if wrong else 0.01)
    assert swiglu.unsupported_reason.__wrapped__(torch.device("cuda")) == ("it is wrong by 0.1" if wrong else None)


def test_a_cpu_has_no_such_kernels() -> None:
    assert swiglu.unsupported_reason(torch.device("cpu")) == "it needs a Hopper GPU"
    (block, _) = model().layers.values()
    assert isinstance(block, Block) and block.fused_norm is None and block.ffn.swiglu is None
