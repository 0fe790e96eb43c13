"""Precision that differences lose on their way between islands."""

from __future__ import annotations

import torch

from meshloom.optim.local.wire import BLOCK, wire_of

numbers = (
    torch.randn(3, 4 * BLOCK, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    * torch.logspace(-6, 3, 3)[:, None]
)


def test_the_masters_dtype_travels_as_it_is() -> None:
    wire = wire_of("fp32")
    assert torch.equal(wire.decode(wire.encode(numbers), torch.float64), numbers)


def test_bf16_rounds_to_eight_bits_of_mantissa() -> None:
    wire = wire_of("bf16")
    sent = wire.encode(numbers)
    assert sent.shape == (3, 2 * 4 * BLOCK)
    assert (wire.decode(sent, torch.float64) - numbers).abs().le(numbers.abs() * 2.0**-8).all()


def test_int8_is_off_by_half_a_step_of_its_block_at_most() -> None:
    """A step is a 127th of the block's largest magnitude. Zeros stay zeros, and what is not finite is not hidden."""
    wire = wire_of("int8")
    sent = wire.encode(numbers)
    assert sent.shape == (3, 4 * (BLOCK + 4))
    largest = numbers.unflatten(1, (4, BLOCK)).abs().amax(2).repeat_interleave(BLOCK, 1)
    assert (wire.decode(sent, torch.float64) - numbers).abs().le(largest / 127 * 0.5 * (1 + 1e-5)).all()
    zeros = torch.zeros(1, BLOCK)
    assert torch.equal(wire.decode(wire.encode(zeros), torch.float32), zeros)
    zeros[0, 3] = torch.nan
    assert wire.decode(wire.encode(zeros), torch.float32).isnan().any()
