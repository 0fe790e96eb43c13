"""The backward pass of fused kernels with an output that has the true one's products with its gradient alone."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from meshloom.kernels.attention_blocks import block_backward, block_forward
from meshloom.kernels.attention_delta import output_with_delta, row_products

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "flash4"])
@pytest.mark.parametrize(("causal", "left"), [(True, None), (False, None), (True, 100), (False, 150)])
def test_gradients_are_those_of_the_true_output(kernel: str, causal: bool, left: int | None) -> None:
    """Both are held to float64: of bf16 the stand-in's gradients may be no further away than a tenth more."""
    if kernel == "flash4" and (importlib.util.find_spec("flash_attn") is None or torch.cuda.get_device_capability()[0] < 9):
        pytest.skip("needs the extra meshloom[flash4] and a Hopper GPU or a later one")
    generator = torch.Generator("cuda").manual_seed(0)
    keys = 256 if causal else 328
    shapes = ((256, 8), (keys, 2), (keys, 2), (256, 8))
    q, k, v, dout = (
        torch.randn((2, length, heads, 64), generator=generator, device="cuda", dtype=torch.bfloat16)
        for length, heads in shapes
    )
    how = {"causal": causal, "scale": 0.125, "kernel": kernel, "left": left}
    exact = [each.double() for each in (dout, q, k, v)]
    expected = block_backward(*exact, *block_forward(*exact[1:], **how), **how)
    out, lse = block_forward(q, k, v, **how)
    stand_in = output_with_delta(dout, row_products(dout, out, lse.dtype))
    assert not torch.allclose(stand_in, out)
    of_true, of_stand_in = (block_backward(dout, q, k, v, each, lse, **how) for each in (out, stand_in))
    for want, true, found in zip(expected, of_true, of_stand_in, strict=True):
        assert (found.double() - want).norm() < 1.1 * (true.double() - want).norm() < 0.02 * want.norm()
