"""AdamW with moments of 8 bits: its table and its errors beside published figures, and its steps beside AdamW's."""

from __future__ import annotations

import pytest
import torch

from meshloom.config.problems import ConfigError
from meshloom.kernels.code_tables import CodeTable
from meshloom.optim.build import build_optimizer
from meshloom.optim.optimizers.config import AdamWConfig, LionConfig, OptimConfig
from meshloom.optim.optimizers.eight_bit import AdamW8bit, dequantize, dynamic_table, quantize
from meshloom.optim.optimizers.eight_bit_config import AdamW8bitConfig
from meshloom.optim.optimizers.parameters import NamedParameter, Unsharded


def table(signed: bool) -> torch.Tensor:
    return torch.tensor(dynamic_table(signed))


def test_the_table_is_the_published_one() -> None:
    signed, unsigned = dynamic_table(True), dynamic_table(False)
    assert len(signed) == len(unsigned) == 256 and signed[-1] == unsigned[-1] == 1.0
    assert signed[0] == pytest.approx(-0.992969, abs=1e-6) and min(v for v in signed if v > 0) == pytest.approx(5.5e-7)
    assert sum(v > 0 for v in signed) == 128 and sum(v < 0 for v in signed) == 127
    assert unsigned[1:4] == pytest.approx([3.25e-7, 7.75e-7, 2.125e-6]) and unsigned[-3:-1] == pytest.approx(
        [0.98945, 0.99648], abs=1e-5
    )


def test_errors_are_as_measured_elsewhere() -> None:
    values = torch.randn(1 << 10, 1 << 10, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(values, table(True), 256)
    assert codes.dtype == torch.uint8 and scales.shape == (1 << 10, 4)
    assert (dequantize(codes, scales, table(True), 256) - values).abs().mean() == pytest.approx(0.00853, rel=0.02)


def test_codes_are_the_nearest_and_blocks_keep_apart() -> None:
    values = torch.tensor([[0.5, -1.0, 2.0, 1e-3, 0.0]], dtype=torch.float64)
    codes, scales = quantize(values, table(True).double(), 2)
    assert scales.tolist() == [[1.0, 2.0, 0.0]]
    back = dequantize(codes, scales, table(True).double(), 2)
    nearest = [
        min(dynamic_table(True), key=lambda v: abs(v - x)) * s for x, s in ((0.5, 1), (-1, 1), (1, 2), (5e-4, 2), (0, 0))
    ]
    assert back[0].tolist() == pytest.approx(nearest, rel=1e-6)


def test_a_cell_and_one_comparison_find_the_nearest_code() -> None:
    random = torch.Generator().manual_seed(0)
    for signed in (True, False):
        tables = CodeTable.of(table(signed))
        borders = tables.borders[:-1]
        drawn = torch.randn(50_000, generator=random) * 10.0 ** -(torch.rand(50_000, generator=random) * 12)
        beside = [torch.nextafter(borders, borders.new_tensor(towards)) for towards in (9.0, -9.0)]
        special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, torch.inf, -torch.inf])
        numbers = torch.cat([drawn, borders, *beside, tables.values, special])
        assert torch.equal(tables.nearest(numbers), torch.bucketize(numbers, borders).to(torch.uint8))


def test_borders_within_a_cell_are_refused() -> None:
    with pytest.raises(ValueError, match="lower 16 bits"):
        CodeTable.of(torch.linspace(1, 1.001, 256))


def trained(config: OptimConfig, steps: int = 30) -> torch.Tensor:
    """A matrix and a vector, drawn towards a target by noisy gradients."""
    random = torch.Generator().manual_seed(0)
    weight, target = torch.nn.Parameter(torch.zeros(64, 96)), torch.randn(64, 96, generator=random)
    optimizer = build_optimizer(config, [NamedParameter("layers.0.w", weight, (64, 96), hidden=True)], Unsharded())
    for _ in range(steps):
        weight.grad = weight.detach() - target + torch.randn(64, 96, generator=random) / 3
        optimizer.step()
    return weight.detach()


def test_steps_are_nearly_adamws() -> None:
    whole = trained(AdamWConfig(lr=0.02, weight_decay=0.1))
    coded = trained(AdamW8bitConfig(lr=0.02, weight_decay=0.1))
    assert 0 < (coded - whole).abs().mean() < 0.03 * whole.abs().mean()
    small = trained(AdamW8bitConfig(lr=0.02, weight_decay=0.1, min_size=10_000))
    torch.testing.assert_close(small, whole, rtol=1e-4, atol=1e-6)


def test_state_takes_two_bytes_an_element() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    optimizer = build_optimizer(AdamW8bitConfig(), [NamedParameter("layers.0.w", weight, (64, 256))], Unsharded())
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = [value for value in optimizer.state[weight].values() if torch.is_tensor(value)]
    assert sum(value.numel() * value.element_size() for value in held) == 2 * 64 * 256 + 2 * 64 * 4


@pytest.mark.parametrize("shape", [(5, 70), (0, 64), (3, 64)])
def test_the_first_moments_are_quantised_zeros(shape: tuple[int, int]) -> None:
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = build_optimizer(
        AdamW8bitConfig(block=32, min_size=0), [NamedParameter("w", weight, (8, shape[1]))], Unsharded()
    )
    assert isinstance(optimizer, AdamW8bit)
    for role, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        held, coded = optimizer._held(optimizer._parameters[0], role), quantize(torch.zeros(shape), table(signed), 32)
        for found, expected in zip(held, coded, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_cut_inside_a_block_is_refused_by_key() -> None:
    cut = NamedParameter("layers.0.wo.weight", torch.nn.Parameter(torch.zeros(64, 96)), (64, 192), offsets=(0, 96))
    with pytest.raises(ConfigError, match=r"optim.block.*64 does not divide the 96 columns.*layers.0.wo.weight"):
        build_optimizer(AdamW8bitConfig(block=64), [cut], Unsharded())
    assert isinstance(build_optimizer(AdamW8bitConfig(block=32), [cut], Unsharded()), AdamW8bit)


def test_lion_is_its_formula() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = build_optimizer(LionConfig(lr=0.1, weight_decay=0.5), [NamedParameter("w", weight, (3,))], Unsharded())
    expected, momentum = weight.detach().clone(), torch.zeros(3, dtype=torch.float64)
    for gradient in (torch.tensor([1.0, -1.0, 0.5]).double(), torch.tensor([-0.05, 3.0, -9.0]).double()):
        weight.grad = gradient.clone()
        optimizer.step()
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * torch.sign(0.9 * momentum + 0.1 * gradient)
        momentum = 0.99 * momentum + 0.01 * gradient
    torch.testing.assert_close(weight.detach(), expected)


def test_a_rank_without_rows_takes_its_step() -> None:
    empty = NamedParameter("layers.0.w", torch.nn.Parameter(torch.zeros(0, 512)), (8, 512), offsets=(8, 0))
    optimizer = build_optimizer(AdamW8bitConfig(), [empty], Unsharded())
    empty.tensor.grad = torch.zeros(0, 512)
    optimizer.step()
    assert optimizer.state[empty.tensor]["exp_avg_code"].shape == (0, 512)
