"""Experts with gathering, SwiGLU and gates inside their products: operators and autograd formulas, with plain products."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from meshloom.kernels.experts import fused, logits, plain
from meshloom.kernels.experts.fused import FusedExperts
from meshloom.kernels.experts.gather_sum import gather_sum
from meshloom.kernels.experts.logits import bf16_parts, router_logits
from meshloom.models.block import Block
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.mixture.charges import Rates
from meshloom.models.mixture.dispatch import sort_by_expert
from meshloom.models.mixture.ledger import Ledger, Routing
from meshloom.models.mixture.mixture import Mixture
from meshloom.models.protocol import BlockKernels
from meshloom.parallel.activation import apply_policies
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import EngineSettings
from meshloom.parallel.layout import Layout
from meshloom.parallel.policies import fused_experts_blocker
from meshloom.parallel.torch import assembly
from support.compiling import counted_graphs
from support.models import decoder

COUNT, WIDTH, DIM = 5, 6, 8
CHOICES: dict[str, torch.Tensor] = {
    "at random": torch.rand(23, COUNT, generator=torch.Generator().manual_seed(5)).topk(3, dim=-1).indices,
    "an expert without a token": torch.rand(23, COUNT - 1, generator=torch.Generator().manual_seed(5)).topk(3, -1).indices + 1,
    "one expert takes all": torch.full((23, 1), 2),
}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def token_by_token(choice_TK: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
    x_TD, w1, w3, w2, gates_TK = leaves
    out: list[torch.Tensor] = []
    for x, chosen, gates in zip(x_TD, choice_TK.tolist(), gates_TK, strict=True):
        y = torch.zeros(DIM, dtype=x.dtype)
        for expert, gate in zip(chosen, gates, strict=True):
            wide, narrow = slice(expert * WIDTH, (expert + 1) * WIDTH), slice(expert * DIM, (expert + 1) * DIM)
            y = y + gate * (w2[narrow] @ (F.silu(w1[wide] @ x) * (w3[wide] @ x)))
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("name", CHOICES)
def test_output_and_gradients_are_those_of_a_loop_over_tokens(name: str) -> None:
    choice_TK = CHOICES[name]
    torch.manual_seed(0)
    leaves = [drawn(23, DIM), drawn(COUNT * WIDTH, DIM), drawn(COUNT * WIDTH, DIM), drawn(COUNT * DIM, WIDTH)]
    leaves.append(drawn(*choice_TK.shape))
    sort = sort_by_expert(choice_TK, COUNT)
    found = FusedExperts()(*leaves, sort.order_N, sort.inverse_TK, sort.counts_E)
    expected = token_by_token(choice_TK, *leaves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn(23, DIM, dtype=torch.float64)
    results = [torch.autograd.grad(y, leaves, gradient) for y in (found, expected)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


def test_only_tokens_and_outputs_of_gate_and_up_are_kept() -> None:
    choice_TK, kept = CHOICES["at random"], []
    sort = sort_by_expert(choice_TK, COUNT)
    leaves = [drawn(23, DIM), drawn(COUNT * WIDTH, DIM), drawn(COUNT * WIDTH, DIM), drawn(COUNT * DIM, WIDTH), drawn(23, 3)]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and all(tensor is not leaf for leaf in leaves):
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        FusedExperts()(*leaves, sort.order_N, sort.inverse_TK, sort.counts_E)
    assert kept == [(23 * 3, 2 * WIDTH)]


def test_rows_are_gathered_and_summed_in_fp32() -> None:
    rows = torch.tensor([[1.0, 2.0], [2.0**-9, 4.0], [-1.0, 8.0]], dtype=torch.bfloat16)
    place = torch.tensor([[0, 1, 2], [2, 2, 1]])
    assert gather_sum(rows, place).tolist() == [[2.0**-9, 14.0], [-2.0, 20.0]]
    gates = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, -1.0]])
    assert gather_sum(rows, place, gates).tolist() == [[0.50390625, 14.0], [-1.0, 4.0]]


def model(dtype: torch.dtype, shared: int = 0) -> Decoder:
    torch.manual_seed(1)
    experts = {"count": 6, "top_k": 2, "ffn_dim": 24, "shared": shared}
    made = decoder(dim=16, layers=2, heads=2, kv_heads=2, ffn_dim=32, vocabulary=50, experts=experts).to(dtype)
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    return made


def passed(built: Decoder) -> list[torch.Tensor]:
    """Loss and gradients, under charges."""
    inputs, targets = torch.randint(50, (2, 2, 16), generator=torch.Generator().manual_seed(2)).unbind()
    ledger = Ledger([0, 1], 6, inputs.device, Rates(z_loss=1e-3))
    ledger.begin(torch.tensor(32.0), torch.rand(2, 6, generator=torch.Generator().manual_seed(3)).double())
    loss = built(inputs, targets, routing=Routing(ledger, torch.ones(2, 16, dtype=torch.bool)))
    return [loss.detach(), *torch.autograd.grad(loss, list(built.parameters()))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels are used on a CPU, by their plain products, whose names are listed as they are called."""
    made: list[str] = []

    def noted(product: Callable[..., Any]) -> Callable[..., Any]:
        def call(*own: Any) -> Any:
            made.append(product.__name__)
            return product(*own)

        return call

    for name in ("gated", "gated_backward"):
        monkeypatch.setattr(plain, name, noted(getattr(plain, name)))
    monkeypatch.setattr(FusedExperts, "fits", lambda *_: True)
    return made


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_a_model_of_fused_mixtures_is_the_plain_one(policy: str, compiled: bool, calls: list[str]) -> None:
    dtype = torch.float32 if compiled else torch.float64  # torch 2.11 can't compile attention in fp64
    expected = passed(model(dtype, shared=policy == "none"))
    assert not calls
    built = model(dtype, shared=policy == "none")
    blocks = list(built.layers.values())
    for block in blocks:
        assert isinstance(block, Block)
        block.use_kernels(BlockKernels(experts=FusedExperts()))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if compiled else {"rtol": 1e-11, "atol": 1e-12}
    with counted_graphs("aot_eager_decomp_partition") as counter:
        apply_policies(blocks, [policy] * 2, compiled=compiled)
        torch.testing.assert_close(passed(built), expected, **tolerance)
    assert (counter.frame_count > 0) == compiled
    assert not counters["graph_break"]  # neither the operators nor the charges interrupt a compiled block
    assert calls.count("gated") == {"none": 2, "selective": 2, "full": 4}[policy]
    assert calls.count("gated_backward") == 2


@pytest.mark.parametrize(
    ("change", "parallel", "reason"),
    [
        ({}, {}, None),
        ({"experts": {"capacity": 1.5}}, {}, "capacity"),
        ({"experts": {"router": "relu"}}, {}, "ReLU"),
        ({"experts": {"gated": False}}, {}, "SwiGLU"),
        ({"experts": {"router": "recurrent"}}, {}, None),
        ({"experts": {"parts": {"combine": {"_target_": "mine.Sum"}}}}, {}, "parts of your own"),
        ({"ffn_bias": True}, {}, "biases"),
        ({"ffn_activation": "gelu"}, {}, "SwiGLU"),
        ({"experts": {"ffn_dim": 96}}, {}, "widths"),
        ({"experts": {"count": 0}}, {}, "no experts"),
        ({}, {"ep": 2}, "parallel.ep"),
        ({}, {"tp": 2}, "parallel.tp"),
        ({}, {"pp": 2, "schedule": "zb"}, "parallel.schedule"),
        ({}, {"engine": "deepspeed"}, "DeepSpeed"),
    ],
)
def test_where_mixtures_may_be_fused(change: dict[str, Any], parallel: dict[str, Any], reason: str | None) -> None:
    experts = {"count": 8, "top_k": 2, "ffn_dim": 128, **change.get("experts", {})}
    shape = {"dim": 64, "layers": 2, "heads": 2, "kv_heads": 2, "ffn_dim": 192, "vocabulary": 50, **change, "experts": experts}
    config = DecoderConfig.of(shape)
    found = fused_experts_blocker(config, ParallelConfig(**parallel), EngineSettings(seed=0, precision="bf16"))
    assert found is None if reason is None else found is not None and reason in found
    assert "bf16" in (fused_experts_blocker(config, ParallelConfig(), EngineSettings(seed=0, precision="fp32")) or "")


@pytest.mark.parametrize("works", [False, True])
def test_mixtures_are_fused_where_the_trial_succeeds(
    works: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="meshloom")
    monkeypatch.setattr(fused, "unsupported_reason", lambda _: None if works else "it is wrong by 1")
    parallel = ParallelConfig()
    mesh: Any = SimpleNamespace(
        layout=Layout.plan(parallel, 1), device=torch.device("cuda"), rank=0, is_main=True, any=lambda flag: flag
    )
    experts = {"count": 6, "top_k": 2, "ffn_dim": 64}
    built = decoder(dim=64, layers=1, heads=2, kv_heads=2, ffn_dim=64, vocabulary=50, experts=experts)
    settings = EngineSettings(seed=0, precision="bf16")
    fuse = assembly.fuses_experts(built, mesh, parallel, settings)
    assembly.parallelize_stage(built, mesh, None, parallel, settings, fuse_swiglu=False, fuse_experts=fuse)
    (block,) = built.layers.values()
    assert isinstance(block, Block) and isinstance(block.ffn, Mixture)
    assert (block.ffn.fused is not None, block.ffn.router.fused is not None) == (works, works)
    assert not assembly.fuses_swiglu(built, mesh, parallel, settings)  # it has no dense part
    assert ("no kernel computes" in caplog.text) is not works and "SwiGLU inside its products" not in caplog.text


def test_the_trial_measures_the_error() -> None:
    assert fused.trial_error(FusedExperts(), torch.device("cpu"), torch.float64) < 1e-13
    assert 1e-3 < fused.trial_error(FusedExperts(), torch.device("cpu"), torch.bfloat16) < 0.01
    assert fused.unsupported_reason(torch.device("cpu")) == "it needs a Hopper GPU"


def test_an_fp32_number_is_the_sum_of_its_bf16_parts() -> None:
    wide = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 5)
    parts = bf16_parts(wide).double().unflatten(1, (-1, 5))
    assert torch.equal(parts.sum(1), wide.double())


def test_logits_and_their_gradients_are_those_of_a_product() -> None:
    x, weight = drawn(9, 8), drawn(4, 8)
    gradient = torch.randn(9, 4, dtype=torch.float64)
    found, expected = (torch.autograd.grad(y, (x, weight), gradient) for y in (router_logits(x, weight), x @ weight.T))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert router_logits(x.bfloat16(), weight.bfloat16()).dtype == torch.float32


def test_kernels_are_compiled_beforehand_as_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dim of a tensor that lies densely is compiled into a kernel, sizes are not."""
    seen: set[tuple[Any, ...]] = set()

    def noted(product: Callable[..., Any]) -> Callable[..., Any]:
        def call(*own: torch.Tensor) -> Any:
            seen.add((product.__name__, *((one.dim(), one.dtype, one.stride().index(1)) for one in own)))
            return product(*own)

        return call

    for name in ("gated", "gated_backward", "rows", "weights"):
        monkeypatch.setattr(plain, name, noted(getattr(plain, name)))
    used = fused.trial_error(FusedExperts(), torch.device("cpu"), torch.bfloat16)
    in_use, _ = set(seen), seen.clear()
    assert used < 0.01 and len(in_use) == 6
    monkeypatch.setattr(fused, "hopper", plain)
    works = fused.compilations()
    for work in works.values():
        work(torch.device("cpu"))
    assert seen == in_use and len(works) == 6


def test_logits_by_bf16_products_are_those_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as a GPU does, with its product of bf16 matrices that ends in fp32 replaced by one in fp32."""
    monkeypatch.setattr(logits, "_exact_in_parts", lambda _: True)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=draw).bfloat16().requires_grad_() for shape in ((50, 16), (6, 16)))
    gradient = torch.randn(50, 6, generator=draw)
    y = router_logits(x, weight)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    expected = wide[0] @ wide[1].T
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    found, exact = torch.autograd.grad(y, (x, weight), gradient), torch.autograd.grad(expected, wide, gradient.double())
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=1e-4)  # rounded once, at the end
