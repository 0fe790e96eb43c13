"""Rotary positions (arXiv 2104.09864), in the "rotate half" convention of Hugging Face.

Shape legend: B batch, S sequence, H heads, E head width.
"""

from __future__ import annotations

import torch


def rotary_table(positions_S: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cosines and sines of the rotary angles, each (…, S, E/2), in fp32 (fp64 if positions are fp64)."""
    dtype = torch.float64 if positions_S.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_dim, 2, device=positions_S.device, dtype=dtype) / head_dim
    angles = positions_S.to(dtype).unsqueeze(-1) * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x_BSHE: torch.Tensor, cos_SE: torch.Tensor, sin_SE: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + E/2). Tables are (S, E/2) or (B, S, E/2)."""
    cos, sin = cos_SE.unsqueeze(-2), sin_SE.unsqueeze(-2)
    first, second = x_BSHE.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSHE.dtype)
