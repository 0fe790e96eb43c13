"""AdamW with moments of 8 bits, a tensor's whole update in one pass over memory (`optim/optimizers/eight_bit.py`).

A program computes some blocks: it restores their moments from codes and scales, updates them and the weight, finds the new
scales and codes, and writes all. With a gradient in fp32 and a bf16 copy that is 18 bytes an element.

A code is found by two steps. The upper 16 bits of a value choose a cell, and a table has the code of the cell's lowest value.
A cell holds one border between codes at most, so a comparison with the next border tells whether it is the next code.

Imported only where Triton is at hand.
"""

# Triton comes with CUDA builds of torch only, and type checkers can't see through its decorator.
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .code_tables import CodeTable
from .rounding import KeptWeight
from .triton_rounding import HeldWeight, load_weight, store_weight

_WARP = 256  # elements of a warp. A block of as many is a program of one warp, which has nobody to wait for


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _restore(codes, scales, values, at, inside, number, live):
    """Return moments from codes and scales; 0 outside."""
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + number, mask=live, other=0.0)
    return tl.where(inside, tl.load(values + code) * scale[:, None], 0.0)


@triton.jit
def _keep(moments, codes, scales, cells, borders, at, inside, number, live, TINY: tl.constexpr):
    """Write moments as scales and the nearest codes."""
    scale = tl.reduce(tl.abs(moments), 1, _larger)
    relative = tl.div_rn(moments, tl.maximum(scale, TINY)[:, None])
    code = tl.load(cells + (relative.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)).to(tl.int32)
    code += (relative > tl.load(borders + code)).to(tl.int32)
    tl.store(codes + at, code.to(tl.uint8), mask=inside)
    tl.store(scales + number, scale, mask=live)


@triton.jit(do_not_specialize=["key", "first_index"])
def _adamw(
    weight,
    other,
    gradient,
    first,
    first_scale,
    second,
    second_scale,
    first_values,
    first_cells,
    first_borders,
    second_values,
    second_cells,
    second_borders,
    scale,
    skip,
    columns,
    blocks_of_row,
    blocks,
    key,
    first_index,
    length,
    stride,
    keep,
    rate_first,
    rate_second,
    step_size,
    root_correction,
    eps,
    SCALED: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    SKIPPABLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    TINY: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = number < blocks
    if SKIPPABLE:
        live = live & (tl.load(skip) == 0)  # a skipped update reads and writes nothing
    lane = tl.arange(0, LANES)
    column = (number % blocks_of_row * BLOCK)[:, None] + lane[None, :]
    inside = live[:, None] & (column < columns)
    if LANES > BLOCK:
        inside = inside & (lane < BLOCK)[None, :]
    at = (number // blocks_of_row * columns)[:, None] + column
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g *= tl.load(scale)
    m = _restore(first, first_scale, first_values, at, inside, number, live)
    v = _restore(second, second_scale, second_values, at, inside, number, live)
    w = load_weight(weight, other, at, inside, HELD)
    m += (g - m) * rate_first
    v += (g * g - v) * rate_second
    _keep(m, first, first_scale, first_cells, first_borders, at, inside, number, live, TINY)
    _keep(v, second, second_scale, second_cells, second_borders, at, inside, number, live, TINY)
    w = w * keep - step_size * tl.div_rn(m, tl.sqrt_rn(v) * root_correction + eps)
    store_weight(w, weight, other, at, inside, key, first_index, length, stride, HELD, ROWS)


def adamw_8bit_update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    tables: tuple[CodeTable, CodeTable],
    copy: torch.Tensor | None,
    scale: torch.Tensor | None,
    skip: torch.Tensor | None = None,
    *,
    block: int,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    kept: KeptWeight | None = None,
) -> None:
    """One update in place, of matrices (R, C) on one GPU, all but the gradient contiguous; the weight fp32.

    first, second  each moment's codes (R, C) uint8, and scales (R, blocks of C) fp32
    tables         of the first and of the second moment's codes
    block          elements of a row that share a scale, or a row: at most 8,192 (a tile in registers)

    The others are those of `triton_adamw.adamw_update`.
    """
    rows, columns = weight.shape
    if rows * columns == 0:
        return
    gradient, blocks_of_row = gradient.contiguous(), -(-columns // block)
    assert all(each.is_contiguous() for each in (*first, *second)), "elements are matched by their place in memory"
    assert first[1].shape == second[1].shape == (rows, blocks_of_row), f"{first[1].shape} is no scale for each block"
    block = min(block, columns)
    lanes = triton.next_power_of_2(block)
    blocks = max(1, _WARP // lanes)
    beta_first, beta_second = betas
    held = HeldWeight.of(weight, copy, kept)
    _adamw[(triton.cdiv(rows * blocks_of_row, blocks),)](
        *(*held.place, gradient, *first, *second),
        *(each for table in tables for each in (table.values, table.cells, table.borders)),
        *(gradient if scale is None else scale, gradient if skip is None else skip),
        *(columns, blocks_of_row, rows * blocks_of_row, *held.draw),
        *(1 - lr * weight_decay, 1 - beta_first, 1 - beta_second),
        *(lr / (1 - beta_first**step), (1 - beta_second**step) ** -0.5, eps),
        SCALED=scale is not None,
        **held.constants,
        SKIPPABLE=skip is not None,
        BLOCK=block,
        LANES=lanes,
        BLOCKS=blocks,
        TINY=torch.finfo(torch.float32).tiny,
        num_warps=min(16, lanes * blocks // _WARP),
    )
