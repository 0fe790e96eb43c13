"""The shapes that kernels support, as plain numbers, for memory estimates and config checks. Imports no torch."""

from __future__ import annotations

LOSS_CHUNK = 8192
"""Tokens whose logits exist at once (`loss.py`): 2 GiB of bf16 logits at a vocabulary of 128k. The head's gradient crosses
memory once for each chunk."""

SWIGLU_UNIT = 64
"""The tiles of fused SwiGLU (`swiglu.py`) want widths that are multiples of it."""


def fused_swiglu_takes(dim: int, ffn_dim: int) -> bool:
    """Return whether the fused SwiGLU kernels take a model of these widths."""
    return dim % SWIGLU_UNIT == 0 and ffn_dim % SWIGLU_UNIT == 0
