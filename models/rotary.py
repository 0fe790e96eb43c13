"""Rotary positions (arXiv 2104.09864), in the "rotate half" convention of Hugging Face unless pairs are interleaved.

Shape legend: B batch, S sequence, H heads, E head width, R width that rotates.
"""

from __future__ import annotations

import math

import torch

from .rope_config import RopeScaling, RotaryConfig

RotaryTable = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, each (S, R/2) or (B, S, R/2)."""


def rotary_table(positions_S: torch.Tensor, config: RotaryConfig) -> RotaryTable:
    """Compute cosines and sines of the rotary angles, each (…, S, R/2), in fp32 (fp64 if positions are fp64)."""
    dtype = torch.promote_types(positions_S.dtype, torch.float32)
    exponents = torch.arange(0, config.width, 2, device=positions_S.device, dtype=dtype) / config.width
    frequencies = scaled_frequencies(config.theta**-exponents, config)
    angles = positions_S.to(dtype).unsqueeze(-1) * frequencies
    factor = config.scaling.angle_factor
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def scaled_frequencies(frequencies: torch.Tensor, config: RotaryConfig) -> torch.Tensor:
    """Scale the angles per position of each pair, (R/2,), for long sequences."""
    scaling = config.scaling
    match scaling.kind:
        case "linear":  # arXiv 2306.15595
            return frequencies / scaling.factor
        case "llama3":
            return _between(frequencies, _llama3_kept(frequencies, scaling), scaling.factor)
        case "yarn":  # arXiv 2309.00071
            return _between(frequencies, _yarn_kept(frequencies, config), scaling.factor)
        case "longrope":  # arXiv 2402.13753
            return frequencies / frequencies.new_tensor(scaling.pair_factors)
        case _:
            return frequencies


def _between(frequencies: torch.Tensor, kept: torch.Tensor, factor: float) -> torch.Tensor:
    """Mix the frequencies as they are, of which `kept` is the share, with those of positions divided by the factor."""
    return kept * frequencies + (1 - kept) * frequencies / factor


def _llama3_kept(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Return 1 for short wavelengths, 0 for long ones, and a ramp in the number of turns between."""
    assert scaling.original_positions is not None
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return ramp.clamp(0, 1)


def _yarn_kept(frequencies: torch.Tensor, config: RotaryConfig) -> torch.Tensor:
    """Return 1 for pairs that turn often within the original context, 0 for those that don't, a ramp in the index between."""
    scaling = config.scaling
    assert scaling.original_positions is not None

    def pair(turns: float) -> float:
        """Find the index, not rounded, of the pair that turns so often."""
        assert scaling.original_positions is not None
        return config.width * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.width - 1)
    if low == high:
        high += 0.001
    index = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
    return 1 - ((index - low) / (high - low)).clamp(0, 1)


def rotate(x_BSHE: torch.Tensor, table: RotaryTable, *, interleaved: bool = False) -> torch.Tensor:
    """Rotate the first R of each head's elements, by pairs (i, i + R/2), or (2i, 2i + 1) if interleaved."""
    cos, sin = (part_SE.unsqueeze(-2) for part_SE in table)
    width = 2 * cos.shape[-1]
    turning, rest = x_BSHE[..., :width], x_BSHE[..., width:]
    wide = turning.to(cos.dtype)
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    out = (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x_BSHE.dtype)
    return out if width == x_BSHE.shape[-1] else torch.cat((out, rest), dim=-1)
