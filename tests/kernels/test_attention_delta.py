"""An output that has a given product with its gradient, held to that product and to whole attention's gradients."""

from __future__ import annotations

import pytest
import torch

from meshloom.kernels.attention_blocks import block_backward, block_forward
from meshloom.kernels.attention_delta import output_with_delta, row_products

SHAPE = (2, 6, 4, 8)  # rows, queries, heads, head dim


def test_backward_pass_needs_no_more_of_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(4))
    dout[0, 1] = 0
    out, lse = block_forward(q, k, v, causal=True, scale=0.3, kernel="cudnn")
    delta = (dout * out).sum(-1).transpose(1, 2)
    torch.testing.assert_close(row_products(dout, out, torch.float64), delta, rtol=0, atol=1e-15)
    expected = block_backward(dout, q, k, v, out, lse, causal=True, scale=0.3, kernel="cudnn")
    stand_in = output_with_delta(dout, delta)
    assert not torch.allclose(stand_in, out) and torch.all(stand_in.norm(dim=-1) <= out.norm(dim=-1) * (1 + 1e-12))
    got = block_backward(dout, q, k, v, stand_in, lse, causal=True, scale=0.3, kernel="cudnn")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e-36, 1e25])
def test_small_and_large_gradients_keep_it(size: float) -> None:
    """Squares of these sizes are no numbers of bf16 and fp32. A rounded row of the true output is as far from it."""
    generator = torch.Generator().manual_seed(1)
    dout, out = (torch.randn((2, 64, 4, 128), generator=generator, dtype=torch.float64) for _ in range(2))
    dout = (size * dout).bfloat16()
    exact = (dout.double() * out).sum(-1).transpose(1, 2)
    stand_in = output_with_delta(dout, exact.float())
    assert stand_in.dtype == torch.bfloat16
    errors = [(row_products(dout, each, torch.float64) - exact).norm() / exact.norm() for each in (stand_in, out.bfloat16())]
    assert errors[0] < errors[1] < 0.01
