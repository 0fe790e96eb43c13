"""AdamW's kernels for moments of 8 bits and for weights without masters: beside PyTorch's operations."""

from __future__ import annotations

import pytest
import torch

from meshloom.kernels.random_bits import BoxIndex
from meshloom.kernels.rounding import KeptWeight, round_stochastic, split_in_two
from meshloom.optim.build import build_optimizer
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.optim.optimizers.eight_bit import AdamW8bit
from meshloom.optim.optimizers.eight_bit_config import AdamW8bitConfig
from meshloom.optim.optimizers.parameters import NamedParameter, Unsharded

pytestmark = pytest.mark.gpu

CODES, SCALES = ("exp_avg_code", "exp_avg_sq_code"), ("exp_avg_scale", "exp_avg_sq_scale")


def coded(weight: torch.nn.Parameter, block: int, copy: torch.Tensor | None = None) -> AdamW8bit:
    shape, config = tuple(weight.shape), AdamW8bitConfig(lr=1e-2, weight_decay=0.1, block=block, min_size=10)
    optimizer = build_optimizer(config, [NamedParameter("w", weight, shape, compute_copy=copy)], Unsharded())
    assert isinstance(optimizer, AdamW8bit)
    return optimizer


@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(33, 512, 256), (7, 600, 256), (20, 37, 6), (3, 1000, 2048), (2, 9000, 8192)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_the_cpu(rows: int, columns: int, block: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(rows, columns, generator=random))
    ours = torch.nn.Parameter(theirs.detach().cuda())
    ours.grad_dtype = None
    copy = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    oracle, optimizer = coded(theirs, block), coded(ours, block, copy)
    assert optimizer.fused_step and optimizer.masked_step and not oracle.fused_step
    for step in range(1, 5):
        drawn = torch.randn(rows, columns, generator=random) * torch.randn(rows, columns, generator=random).mul(2).exp()
        drawn[0] *= step != 2
        ours.grad = drawn.to(dtype).cuda()
        theirs.grad = ours.grad.float().cpu() / 4
        optimizer.gradient_scale, optimizer.skip = torch.tensor(0.25, device="cuda"), torch.tensor(0.0, device="cuda")
        optimizer.step()
        oracle.step()
        state, expected = optimizer.state[ours], oracle.state[theirs]
        assert state["step"] == expected["step"] == step and optimizer.gradient_scale is optimizer.skip is None
        for key in CODES:
            away = (state[key].cpu().int() - expected[key].int()).abs()
            # A first moment is one rounded product. Later sums may differ in their last bit, as may the codes beside a border.
            assert away.max() <= (step > 1) and (away > 0).float().mean() < 1e-2, key
        for key in SCALES:
            torch.testing.assert_close(state[key].cpu(), expected[key], rtol=1e-5 if step > 1 else 0, atol=0)
        torch.testing.assert_close(copy, ours.detach().bfloat16(), rtol=0, atol=0)
        close = (ours.detach().cpu() - theirs.detach()).abs() <= 1e-4 * theirs.detach().abs() + 1e-5
        assert close.float().mean() > 0.99, "sums of moments that cancel may differ"
        ours.data.copy_(theirs.data)
        for key in (*CODES, *SCALES):  # so that differences do not add up over steps
            state[key].copy_(expected[key])


def test_a_skipped_step_changes_no_code_and_reads_nothing() -> None:
    weight = torch.nn.Parameter(torch.randn(30, 300, device="cuda"))
    vector = torch.nn.Parameter(torch.randn(30, device="cuda"))
    named = [NamedParameter("w", weight, (30, 300)), NamedParameter("v", vector, (30,))]
    optimizer = AdamW8bit(AdamW8bitConfig(min_size=10), named, Unsharded())
    kept: list[torch.Tensor] = []
    for skipped in (0.0, 1.0, 1.0, 0.0):
        for each in (weight, vector):
            each.grad = torch.full_like(each, torch.nan if skipped else 0.5)
        optimizer.skip = torch.tensor(skipped, device="cuda")
        optimizer.step()
        held = [*optimizer.state[weight].values(), *optimizer.state[vector].values()]
        now = [each.detach().clone() for each in (weight, vector, *held) if isinstance(each, torch.Tensor)]
        if skipped:
            optimizer.forget_steps(1)
            assert all(torch.equal(one, other) for one, other in zip(now, kept, strict=True))
        kept = now
    assert optimizer.state[weight]["step"] == optimizer.state[vector]["step"] == 2
    assert all(bool(each.isfinite().all()) for each in (weight, vector))


def test_what_is_no_number_is_kept_in_the_scale() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 512, device="cuda"))
    optimizer = coded(weight, 256)
    weight.grad = torch.ones_like(weight)
    weight.grad[1, 300] = torch.nan
    optimizer.step()
    for key in SCALES:
        assert optimizer.state[weight][key].isnan().tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("remainders", [False, True], ids=["stochastic", "kahan"])
@pytest.mark.parametrize("moments", ["whole", "coded"])
def test_a_weight_without_master_has_the_bits_of_one_with(remainders: bool, moments: str) -> None:
    shape, whole, offsets, key = (40, 256), (64, 300), (3, 44), 2**63 + 5
    torch.manual_seed(0)
    value = torch.randn(shape, device="cuda").bfloat16()
    remainder = (torch.randn(shape, device="cuda") * 1e-3).bfloat16() if remainders else None
    box = BoxIndex.of(shape, whole, offsets)
    assert box is not None
    optimizers = []
    for _ in range(2):
        weight = torch.nn.Parameter(torch.zeros(shape, device="cuda"))
        if moments == "coded":
            optimizers.append((weight, coded(weight, 256)))
        else:
            optimizers.append(
                (weight, AdamW(AdamWConfig(lr=1e-2, weight_decay=0.1), [NamedParameter("w", weight, shape)], Unsharded()))
            )
    (master, first), (absent, second) = optimizers
    absent.untyped_storage().resize_(0)
    high, low = value.clone(), None if remainder is None else remainder.clone()
    for number in range(3):
        gradient = torch.randn(shape, device="cuda")
        master.grad = absent.grad = gradient
        master.data.copy_(high)
        if low is not None:
            master.data.add_(low)
        first.step()
        if low is None:
            round_stochastic(master.detach(), high, key=key + number, global_shape=whole, offsets=offsets)
        else:
            split_in_two(master.detach(), high, low)
        second.kept = {absent: KeptWeight(value, remainder, key + number, box)}
        second.step()
        assert second.kept is None and not absent.untyped_storage().size()
        # Compiled with other constants, a kernel may fuse a product and a sum that the other rounds apart.
        assert (value == high).float().mean() > 0.999
        value.copy_(high)
        if remainder is not None and low is not None:
            assert (remainder == low).float().mean() > 0.99
            remainder.copy_(low)
    assert not torch.equal(high, torch.zeros_like(high))
