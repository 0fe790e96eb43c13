"""The plain attention seam, held to the textbook formula with an explicit mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from meshloom.kernels import attention_blocks, flash4
from meshloom.kernels.attention import CausalAttention
from meshloom.kernels.attention_blocks import Kernel
from meshloom.kernels.attention_op import attend as attend_op
from meshloom.kernels.documents import Documents
from meshloom.kernels.flex import flex_attend

attend = CausalAttention()


def textbook(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    documents_BS: torch.Tensor | None,
    scale: float | None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ · scale + mask) v, one head at a time, nothing fused."""
    length, heads, dim = q_BSHD.shape[1:]
    group = heads // k_BSKD.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool, device=q_BSHD.device).tril().expand(q_BSHD.shape[0], -1, -1)
    if documents_BS is not None:
        allowed = allowed & (documents_BS[:, :, None] == documents_BS[:, None, :])
    if window is not None:
        at = torch.arange(length, device=q_BSHD.device)
        allowed = allowed & (at[:, None] - at[None, :] < window)
    outs = []
    for head in range(heads):
        scores = q_BSHD[:, :, head] @ k_BSKD[:, :, head // group].transpose(1, 2)
        scores = scores * (1 / math.sqrt(dim) if scale is None else scale)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~allowed, -math.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks[head].expand(*scores.shape[:2], 1)), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :length]
        outs.append(weights @ v_BSKD[:, :, head // group])
    return torch.stack(outs, dim=2)


def random_documents(batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Runs of random lengths, different in each row, counted from 0."""
    starts = torch.rand(batch, length, generator=generator) < 0.2
    starts[:, 0] = False
    return starts.long().cumsum(1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_the_textbook_with_gradients(kv_heads: int, with_documents: bool, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    shapes = [(3, 23, 4, 8), (3, 23, kv_heads, 8), (3, 23, kv_heads, 8)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    documents = random_documents(3, 23, generator) if with_documents else None
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    packed = None if documents is None else Documents.of(documents)
    out = attend(inputs[0], inputs[1], inputs[2], packed, scale=scale)
    expected = textbook(inputs[0], inputs[1], inputs[2], documents, scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for got, want in zip(torch.autograd.grad(out, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"),
    [(5, None, False), (1, None, False), (None, 0.6, False), (None, None, True), (7, 0.9, True)],
)
def test_windows_caps_and_sinks_equal_the_textbook(
    window: int | None, softcap: float | None, with_sinks: bool, with_documents: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 23, 4, 8), (3, 23, 2, 8), (3, 23, 2, 8)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    sinks = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_() if with_sinks else None
    documents = random_documents(3, 23, generator) if with_documents else None
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    q, k, v = inputs
    packed = None if documents is None else Documents.of(documents)
    out = attend(q, k, v, packed, scale=0.8, window=window, softcap=softcap, sinks=sinks)
    expected = textbook(q, k, v, documents, 0.8, window, softcap, sinks)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    leaves = [*inputs, *([] if sinks is None else [sinks])]
    for got, want in zip(torch.autograd.grad(out, leaves, weight), torch.autograd.grad(expected, leaves, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(("window", "with_sinks"), [(None, False), (6, True)])
def test_flex_attention_equals_the_textbook(window: int | None, with_sinks: bool, with_documents: bool) -> None:
    """Forward, in its plain form: PyTorch has no backward pass of it for a CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 23, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator, dtype=torch.float64) if with_sinks else None
    documents = random_documents(2, 23, generator) if with_documents else None
    packed = None if documents is None else Documents.of(documents)
    out = flex_attend(q, k, v, packed, scale=0.8, window=window, softcap=0.7, sinks=sinks, flex=flex_attention)
    torch.testing.assert_close(out, textbook(q, k, v, documents, 0.8, window, 0.7, sinks), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_operator_keeps_pytorchs_rules(packed: bool, sinks: bool) -> None:
    cu_seqlens = Documents.of(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])).cu_seqlens
    ends = (cu_seqlens, cu_seqlens.clone()) if packed else (None, None)
    q, k = torch.randn(2, 5, 4, 8, requires_grad=True), torch.randn(2, 5, 2, 8, requires_grad=True)
    logits = torch.randn(4, requires_grad=True) if sinks else None
    torch.library.opcheck(attend_op, (q, k, k.detach(), *ends, logits, 0.5, 3, 2.0, "cudnn"))


def test_compiles_without_a_break() -> None:
    documents = Documents.of(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]))
    q = torch.randn(2, 5, 2, 8, requires_grad=True)
    compiled = torch.compile(lambda q, d: attend(q * 2, q, q, d), fullgraph=True, backend="aot_eager")
    (plain,) = torch.autograd.grad(attend(q * 2, q, q, documents).square().sum(), q)
    (got,) = torch.autograd.grad(compiled(q, documents).square().sum(), q)
    torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("causal", [False, True])
def test_the_formula_for_unusual_types_equals_the_fused_kernel(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(2, 6, 4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 6 if causal else 9, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def both() -> list[torch.Tensor]:
        out, lse = attention_blocks.block_forward(q, k, v, causal=causal, scale=0.7, kernel="cudnn")
        return [out, lse, *attention_blocks.block_backward(dout, q, k, v, out, lse, causal=causal, scale=0.7, kernel="cudnn")]

    fused = both()
    monkeypatch.setattr(attention_blocks, "kernel_for", lambda *_: "math")
    for got, want in zip(both(), fused, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_fused_blocks_on_a_gpu_equal_the_formula(kernel: str, causal: bool, dim: int) -> None:
    """Half precision against float32 on the same rounded inputs; gradients given a larger row's output and log-sum-exp."""
    generator = torch.Generator("cuda").manual_seed(dim)

    def draw(length: int, heads: int) -> torch.Tensor:
        return torch.randn(2, length, heads, dim, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, dout, k, v = draw(256, 8), draw(256, 8), draw(256 if causal else 384, 2), draw(256 if causal else 384, 2)
    single = [x.float() for x in (q, k, v)]
    out, lse = attention_blocks.block_forward(*single, causal=causal, scale=0.2, kernel=kernel)
    out, lse = out.bfloat16(), lse + 0.5  # as if half as many keys again had been merged in
    expected = attention_blocks.block_backward(dout.float(), *single, out.float(), lse, causal=causal, scale=0.2, kernel=kernel)
    got_out, got_lse = attention_blocks.block_forward(q, k, v, causal=causal, scale=0.2, kernel=kernel)
    torch.testing.assert_close(got_out.float(), out.float(), rtol=0.02, atol=0.01)
    torch.testing.assert_close(got_lse, lse - 0.5, rtol=0, atol=1e-3)
    got = attention_blocks.block_backward(dout, q, k, v, out, lse, causal=causal, scale=0.2, kernel=kernel)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05 * float(other.std()))


@pytest.mark.gpu
def test_documents_on_a_gpu_equal_those_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    documents = random_documents(2, 256, generator)
    inputs = [torch.randn(2, 256, heads, 64, generator=generator).bfloat16() for heads in (8, 2, 2)]
    dout = torch.randn(2, 256, 8, 64, generator=generator).bfloat16()
    results: list[list[torch.Tensor]] = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        out = attend(leaves[0], leaves[1], leaves[2], Documents.of(documents).to(torch.device(device)))
        grads = torch.autograd.grad(out, leaves, dout.to(device, dtype))
        results.append([x.detach().float().cpu() for x in (out, *grads)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.std()))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "flash4"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(("window", "softcap", "with_sinks"), [(100, None, False), (None, 5.0, False), (70, 3.0, True)])
def test_windows_caps_and_sinks_on_a_gpu_equal_the_textbook(
    window: int | None, softcap: float | None, with_sinks: bool, with_documents: bool, dim: int, kernel: Kernel
) -> None:
    """By the kernel that this choice comes to, against float64. Documents are longer than windows and than tiles."""
    if kernel == "flash4" and flash4.unsupported_reason() is not None:
        pytest.skip("needs FlashAttention 4")
    generator = torch.Generator("cuda").manual_seed(dim)
    shapes = [*((2, 700, heads, dim) for heads in (8, 2, 2)), *([(8,)] if with_sinks else [])]
    leaves = [torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    dout = torch.randn(shapes[0], generator=generator, device="cuda").bfloat16()
    documents = (torch.arange(700) + torch.tensor([[0], [130]])) // 300 if with_documents else None
    packed = None if documents is None else Documents.of(documents).to(torch.device("cuda"))
    out = CausalAttention(kernel)(*leaves[:3], packed, window=window, softcap=softcap, sinks=leaves[3] if with_sinks else None)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    numbers = None if documents is None else documents.cuda()
    expected = textbook(*exact[:3], numbers, None, window, softcap, exact[3] if with_sinks else None)
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    for got, want in zip(found, [expected, *torch.autograd.grad(expected, exact, dout.double())], strict=True):
        assert (got.double() - want).norm() < 0.02 * want.norm()
