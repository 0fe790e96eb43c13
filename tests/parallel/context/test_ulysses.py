"""Ulysses attention in float64, held to full causal attention in one process: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from meshloom.kernels.attention import CausalAttention
from meshloom.kernels.documents import Documents
from meshloom.parallel.context.ulysses import ulysses_attend
from support.ranks import run_ranks

ROWS, LENGTH, HEADS, DIM = 2, 24, 12, 8
KV_HEADS = (1, 2, 4, 6, 12)
SINKS = torch.linspace(-1, 1, HEADS, dtype=torch.float64)


def inputs(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(kv_heads)
    shapes = [(ROWS, LENGTH, heads, DIM) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def documents() -> Documents:
    lengths = [torch.tensor([5, 11, 8]), torch.tensor([20, 1, 3])]
    return Documents.of(torch.stack([torch.repeat_interleave(torch.arange(3), row) for row in lengths]))


def whole(kv_heads: int, packed: Documents | None) -> list[torch.Tensor]:
    *leaves, dout = inputs(kv_heads)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = CausalAttention()(leaves[0], leaves[1], leaves[2], packed, scale=0.4)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _share(rank: int, size: int, compiled: bool) -> list[list[torch.Tensor]]:
    group = dist.group.WORLD
    assert group is not None

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Documents | None) -> torch.Tensor:
        return ulysses_attend(q * 1.0, k, v, packed, group=group, attend=CausalAttention(), scale=0.4)

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    results: list[list[torch.Tensor]] = []
    for kv_heads in (2,) if compiled else KV_HEADS:
        for packed in (documents(),) if compiled else (None, documents()):
            *leaves, dout = (tensor.chunk(size, dim=1)[rank] for tensor in inputs(kv_heads))
            leaves = [leaf.requires_grad_() for leaf in leaves]
            out = function(*leaves, packed)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    return results


@pytest.mark.parametrize(("size", "compiled"), [(2, False), (3, False), (4, False), (2, True)])
def test_equals_attention_in_one_process(size: int, compiled: bool) -> None:
    """Also where key/value heads are fewer than ranks, or do not divide by them."""
    expected = [
        whole(kv_heads, packed)
        for kv_heads in ((2,) if compiled else KV_HEADS)
        for packed in ((documents(),) if compiled else (None, documents()))
    ]
    for rank, results in enumerate(run_ranks(size, _share, compiled)):
        for parts, wholes in zip(results, expected, strict=True):
            for name, got, want in zip(("out", "dq", "dk", "dv"), parts, wholes, strict=True):
                torch.testing.assert_close(
                    got, want.chunk(size, dim=1)[rank], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
                )


def _special(rank: int, size: int) -> list[torch.Tensor]:
    group = dist.group.WORLD
    assert group is not None
    sinks = SINKS.clone().requires_grad_()
    *leaves, dout = (tensor.chunk(size, dim=1)[rank] for tensor in inputs(4))
    q, k, v = (leaf.requires_grad_() for leaf in leaves)
    attend = CausalAttention()
    out = ulysses_attend(q, k, v, documents(), group=group, attend=attend, window=5, softcap=0.8, sinks=sinks)
    return [out.detach(), *torch.autograd.grad(out, [q, k, v, sinks], dout)]


def test_a_window_a_cap_and_sinks_are_those_of_one_process() -> None:
    sinks = SINKS.clone().requires_grad_()
    *leaves, dout = inputs(4)
    q, k, v = (leaf.requires_grad_() for leaf in leaves)
    out = CausalAttention()(q, k, v, documents(), window=5, softcap=0.8, sinks=sinks)
    *expected, dsinks = [out.detach(), *torch.autograd.grad(out, [q, k, v, sinks], dout)]
    results = run_ranks(2, _special)
    for rank, parts in enumerate(results):
        for got, want in zip(parts[:4], expected, strict=True):
            torch.testing.assert_close(got, want.chunk(2, dim=1)[rank], rtol=0, atol=1e-10)
    torch.testing.assert_close(sum(parts[4] for parts in results), dsinks, rtol=0, atol=1e-10)
