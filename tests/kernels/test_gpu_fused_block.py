"""A block's fused kernels against the formulas in float64, and a block with them against the plain one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from meshloom.kernels import norm, swiglu
from meshloom.models.block import Block
from meshloom.models.config import DecoderConfig
from meshloom.models.protocol import BlockKernels
from meshloom.models.rope_config import RotaryConfig
from meshloom.models.rotary import rotary_table

pytestmark = pytest.mark.gpu


def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * std).to(dtype)


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def quack() -> None:
    if importlib.util.find_spec("quack") is None or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs the extra meshloom[flash4] and a Hopper GPU")
    assert swiglu.unsupported_reason(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("width", [2048, 3072, 64, 8192])
@pytest.mark.parametrize("uses", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm(width: int, uses: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width + uses)
    x, weight = draw(3, 333, width, dtype=dtype), draw(width, dtype=dtype)
    gradients = [draw(3, 333, width, std=1e-3, dtype=dtype) for _ in range(uses + 1)]
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    outputs = norm.FusedNorm()(x, weight, 1e-5, uses)
    found = torch.autograd.grad(outputs, leaves, gradients)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = F.rms_norm(exact[0], (width,), exact[1], 1e-5)
    total = sum(gradient.double() for gradient in gradients[1:])
    expected = torch.autograd.grad((exact[0] * 1, y), exact, (gradients[0].double(), total))
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-5
    assert far(outputs[1], y.detach()) < tolerance
    assert all(far(one, other) < tolerance for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("rows", "width"), [(8192, 2048), (64, 4096), (3, 24)])
def test_rows_in_turns_and_apart(rows: int, width: int) -> None:
    a, b = draw(rows, width), draw(rows, width)
    both = swiglu.in_turns(a, b)
    assert torch.equal(both, torch.stack((a, b), 1).flatten(0, 1))
    assert all(torch.equal(one, other) for one, other in zip(swiglu.apart(both), (a, b), strict=True))


@pytest.mark.usefixtures("quack")
@pytest.mark.parametrize(("tokens", "dim", "width"), [(4096, 2048, 8192), (1000, 256, 704), (1, 64, 64)])
def test_feed_forward(tokens: int, dim: int, width: int) -> None:
    torch.manual_seed(tokens)
    leaves = [draw(tokens, dim), draw(width, dim, std=0.02), draw(width, dim, std=0.02), draw(dim, width, std=0.02)]
    gradient = draw(tokens, dim, std=1e-3)

    def run(x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T

    results: list[list[torch.Tensor]] = []
    for function, dtype in ((swiglu.FusedSwiglu(), torch.bfloat16), (run, torch.bfloat16), (run, torch.float64)):
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        y = function(*own)
        results.append([y.detach(), *torch.autograd.grad(y, own, gradient.to(dtype))])
    fused, plain, exact = results
    for one, other, true in zip(fused, plain, exact, strict=True):
        assert far(one, true) < max(1.2 * far(other, true), 4e-3)


@pytest.mark.usefixtures("quack")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fused_block_is_the_plain_one(compiled: bool) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(dim=512, layers=1, heads=8, kv_heads=2, ffn_dim=1024)
    block = Block(config.block(0)).to("cuda", torch.bfloat16)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.05)
    x, gradient = draw(2, 384, 512).requires_grad_(), draw(2, 384, 512, std=1e-3)
    rotary = rotary_table(torch.arange(384, device="cuda"), RotaryConfig(64, 10_000.0))
    results: list[list[torch.Tensor]] = []
    for fused in (False, True):
        block.use_kernels(BlockKernels(norm=norm.FusedNorm(), swiglu=swiglu.FusedSwiglu()) if fused else BlockKernels())
        run = torch.compile(block.forward, dynamic=False) if compiled else block.forward
        y, *_ = run(x, rotary, None)
        results.append([y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], gradient)])
    assert all(far(one, other) < 2e-2 for one, other in zip(*results, strict=True))
