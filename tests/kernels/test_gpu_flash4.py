"""FlashAttention 4 behind our operators against the formula in float64: whole sequences, blocks, documents, compiled."""

from __future__ import annotations

import importlib.util
from itertools import accumulate

import pytest
import torch

from meshloom.kernels import flash4
from meshloom.kernels.attention import CausalAttention
from meshloom.kernels.attention_blocks import Segments, block_backward, block_forward, segments_backward, segments_forward

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needed() -> None:
    if importlib.util.find_spec("flash_attn") is None or torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs the extra meshloom[flash4] and a Hopper GPU or a later one")
    assert flash4.unsupported_reason() is None


def draw(queries: int, keys: int, dim: int, batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(queries + keys + dim)
    sizes = ((queries, 8), (keys, 2), (keys, 2), (queries, 8))
    return [torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16) for length, heads in sizes]


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, seen: torch.Tensor, softcap: float | None = None
) -> list[torch.Tensor]:
    """Output, log-sum-exp and gradients in float64; seen: (Q, T), which keys a query attends to."""
    q, k, v = (tensor.double().requires_grad_() for tensor in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhd,bthd->bhqt", q, k.repeat_interleave(groups, 2)) * q.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    out = torch.einsum("bhqt,bthd->bqhd", scores.softmax(-1), v.repeat_interleave(groups, 2))
    return [out, scores.logsumexp(-1), *torch.autograd.grad(out, (q, k, v), dout.double())]


def check(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).norm() < 1e-2 * other.norm()


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device="cuda").tril()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys", "square"), [(384, 384, True), (200, 328, False)])
def test_blocks(dim: int, queries: int, keys: int, square: bool) -> None:
    q, k, v, dout = draw(queries, keys, dim)
    seen = causal(queries) if square else torch.ones(queries, keys, dtype=torch.bool, device="cuda")
    out, log_sum = block_forward(q, k, v, causal=square, scale=dim**-0.5, kernel="flash4")
    grads = block_backward(dout, q, k, v, out, log_sum, causal=square, scale=dim**-0.5, kernel="flash4")
    check([out, log_sum, *grads], exact(q, k, v, dout, seen))


@pytest.mark.parametrize(
    ("queries", "keys", "left", "softcap"), [(384, 384, 100, None), (200, 328, 150, None), (200, 328, None, 5.0)]
)
def test_blocks_through_a_window_or_with_capped_scores(
    queries: int, keys: int, left: int | None, softcap: float | None
) -> None:
    """Of a ring: the last query and the last key lie at one position, whatever their numbers."""
    q, k, v, dout = draw(queries, keys, 128)
    square = queries == keys
    behind = torch.arange(queries, device="cuda")[:, None] + keys - queries - torch.arange(keys, device="cuda")
    seen = (behind >= 0 if square else behind == behind) & (behind <= (keys if left is None else left))
    how = {"causal": square, "scale": 128**-0.5, "kernel": "flash4", "left": left, "softcap": softcap}
    out, log_sum = block_forward(q, k, v, **how)
    grads = block_backward(dout, q, k, v, out, log_sum, **how)
    check([out, log_sum, *grads], exact(q, k, v, dout, seen, softcap))


def test_documents_laid_end_to_end() -> None:
    lengths = (100, 1, 227, 56)
    q, k, v, dout = draw(sum(lengths), sum(lengths), 64, batch=1)
    on_host = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    segments = Segments(on_host.to(q.device), on_host)
    out, log_sum = segments_forward(q, k, v, segments, scale=0.125, kernel="flash4")
    grads = segments_backward(dout, q, k, v, out, log_sum, segments, scale=0.125, kernel="flash4")
    number = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), torch.tensor(lengths, device="cuda"))
    seen = causal(sum(lengths)) & (number[:, None] == number[None, :])
    check([out, log_sum, *grads], exact(q, k, v, dout, seen))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_models_attention_uses_it(compiled: bool) -> None:
    q, k, v, dout = draw(512, 512, 128)
    seen = causal(512)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return CausalAttention("flash4")(q * 1, k * 1, v * 1)

    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = (torch.compile(run, fullgraph=True) if compiled else run)(*leaves)
    assert "lash4" in str(out.grad_fn) or compiled
    expected = exact(q, k, v, dout, seen)
    check([out, *torch.autograd.grad(out, leaves, dout)], [expected[0], *expected[2:]])
