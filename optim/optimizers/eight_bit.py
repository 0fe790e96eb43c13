"""AdamW whose moments have 8 bits an element (Dettmers et al., arXiv 2110.02861).

A moment is a code of 256 values for each element and a scale for each block of a row: element = table[code] · scale, where the
scale is the block's largest magnitude. The table is the paper's dynamic tree: its exponent takes as many bits as it needs.

Blocks are those of the whole matrix, so a rank's rows have the same scales on every layout. A cut of columns must keep to
their borders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...config.problems import ConfigError, Problem
from ...kernels.code_tables import CodeTable
from ...kernels.rounding import KeptWeight
from .adamw import have_kernels
from .config import base_rate
from .eight_bit_config import LARGEST_BLOCK, AdamW8bitConfig
from .own_arrays import OwnArray
from .parameters import NamedParameter, Shards, decay_groups

EXPONENTS = 7


@functools.cache
def dynamic_table(signed: bool) -> tuple[float, ...]:
    """Return the 256 values that codes stand for, in order. signed: with values below 0."""
    values = [0.0, 1.0]
    for exponent in range(EXPONENTS):
        count = (2**exponent if signed else 2 ** (exponent + 1)) + 1
        borders = torch.linspace(0.1, 1, count, dtype=torch.float64)
        means = ((borders[:-1] + borders[1:]) / 2 * 10.0 ** (exponent - EXPONENTS + 1)).tolist()
        values += [*means, *(-mean for mean in means)] if signed else means
    assert len(values) == 256, f"{len(values)} values"
    return tuple(sorted(values))


def quantize(values_RC: torch.Tensor, table_256: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes (R, C) uint8, the nearest ones, and the scales (R, blocks of C)."""
    rows, columns = values_RC.shape
    blocks = -(-columns // block)
    padded = torch.nn.functional.pad(values_RC, (0, blocks * block - columns)).view(rows, blocks, block)
    scales_RB = padded.abs().amax(2)
    borders_255 = (table_256[:-1] + table_256[1:]) / 2
    relative = padded / scales_RB.clamp(min=torch.finfo(padded.dtype).tiny)[:, :, None]
    codes = torch.bucketize(relative, borders_255, out_int32=True).to(torch.uint8)
    return codes.view(rows, blocks * block)[:, :columns].contiguous(), scales_RB


def dequantize(codes_RC: torch.Tensor, scales_RB: torch.Tensor, table_256: torch.Tensor, block: int) -> torch.Tensor:
    """Return the values (R, C) of codes and scales."""
    whole = scales_RB.repeat_interleave(block, dim=1)[:, : codes_RC.shape[1]]
    return table_256[codes_RC.int()] * whole


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with quantised moments: they are restored, moved and quantised again within a step.

    For fp32 weights on a GPU with Triton the update of a weight is one kernel, a `FusedStep`: its codes are those of PyTorch's
    operations, up to the rounding of moments. Raises ConfigError where a rank's columns begin or end inside a block.
    """

    gradient_scale: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    kept: Mapping[torch.Tensor, KeptWeight] | None = None

    def __init__(self, config: AdamW8bitConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._betas, self._eps, self._block = config.betas, config.eps, config.block
        self._parameters = list(parameters)
        self._tables: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self._code_tables: dict[torch.device, tuple[CodeTable, CodeTable]] = {}
        self._coded = {p.name: _is_coded(p, config) for p in parameters}
        cut = [p for p in parameters if self._coded[p.name] and p.cuts_columns_inside(config.block)]
        if cut:
            name, columns = cut[0].name, cut[0].tensor.shape[1]
            message = f"{config.block} does not divide the {columns} columns that a rank has of {name}"
            raise ConfigError([Problem("optim.block", message, "choose a smaller block, or another parallel.tp")])
        super().__init__(decay_groups(parameters, config.weight_decay), {"lr": base_rate(config)})

    def own_arrays(self) -> Iterator[OwnArray]:
        """Yield the scales: an array (rows, blocks) for each moment of a matrix."""
        for parameter in self._parameters:
            if self._coded[parameter.name]:
                rows, columns = parameter.global_shape
                first_row, first_column = parameter.offsets
                for role in ("exp_avg_scale", "exp_avg_sq_scale"):
                    scales = self.state[parameter.tensor].get(role)
                    if scales is not None:
                        shape, begin = (rows, -(-columns // self._block)), (first_row, first_column // self._block)
                        yield OwnArray(parameter.name, role, scales, shape, begin)

    @property
    def fused_step(self) -> bool:
        """True where one kernel does the step of each weight: see `FusedStep`."""
        longest = max((min(self._block, p.tensor.shape[1]) for p in self._parameters if self._coded[p.name]), default=0)
        return longest <= LARGEST_BLOCK and have_kernels(parameter.tensor for parameter in self._parameters)

    @property
    def masked_step(self) -> bool:
        """True where the kernels can be skipped on the device: see `MaskedStep`."""
        return self.fused_step

    @property
    def rounded_step(self) -> bool:
        """True where the kernels round weights: see `RoundedStep`."""
        return self.fused_step

    def forget_steps(self, count: int) -> None:
        """See `MaskedStep`."""
        for state in self.state.values():
            if state:
                state["step"] -= count

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one update."""
        assert closure is None
        settings = {name: (group["lr"], group["weight_decay"]) for group in self.param_groups for name in group["names"]}
        fused = self.fused_step
        assert fused or self.gradient_scale is self.skip is self.kept is None, "only the fused step takes them"
        for parameter in self._parameters:
            gradient = parameter.tensor.grad
            if gradient is not None and fused:
                self._fused_step(parameter, gradient, *settings[parameter.name])
            elif gradient is not None:
                self._step(parameter, gradient.to(parameter.tensor.dtype), *settings[parameter.name])
        self.gradient_scale = self.skip = self.kept = None

    def _fused_step(self, parameter: NamedParameter, gradient: torch.Tensor, lr: float, weight_decay: float) -> None:
        from ...kernels.triton_adamw import adamw_update
        from ...kernels.triton_eight_bit import adamw_8bit_update

        weight, state = parameter.tensor, self.state[parameter.tensor]
        state["step"] = state.get("step", 0) + 1
        betas = self._betas[0], self._betas[1]
        settings: dict[str, Any] = {
            "step": state["step"],
            "lr": lr,
            "betas": betas,
            "eps": self._eps,
            "weight_decay": weight_decay,
        }
        given = parameter.compute_copy, self.gradient_scale, self.skip
        kept = None if self.kept is None else self.kept.get(weight)
        if self._coded[parameter.name]:
            moments = self._held(parameter, "exp_avg"), self._held(parameter, "exp_avg_sq")
            tables = self._code_tables_on(weight.device)
            adamw_8bit_update(weight, gradient, *moments, tables, *given, block=self._block, kept=kept, **settings)
        else:
            for role in ("exp_avg", "exp_avg_sq"):
                if role not in state:
                    state[role] = torch.zeros_like(weight)
            adamw_update(weight, gradient, state["exp_avg"], state["exp_avg_sq"], *given, kept=kept, **settings)

    def _code_tables_on(self, device: torch.device) -> tuple[CodeTable, CodeTable]:
        """Return the tables of both moments. Kept: making them waits for the device."""
        if device not in self._code_tables:
            first, second = (torch.tensor(dynamic_table(signed), dtype=torch.float32) for signed in (True, False))
            self._code_tables[device] = CodeTable.of(first).on(device), CodeTable.of(second).on(device)
        return self._code_tables[device]

    def _step(self, parameter: NamedParameter, gradient: torch.Tensor, lr: float, weight_decay: float) -> None:
        weight, state = parameter.tensor, self.state[parameter.tensor]
        coded = self._coded[parameter.name]
        state["step"] = step = state.get("step", 0) + 1
        means = self._read(parameter, "exp_avg") if coded else state.setdefault("exp_avg", torch.zeros_like(weight))
        squares = self._read(parameter, "exp_avg_sq") if coded else state.setdefault("exp_avg_sq", torch.zeros_like(weight))
        first, second = self._betas
        means.lerp_(gradient, 1 - first)
        squares.lerp_(gradient.square(), 1 - second)
        if coded:
            self._write(parameter, "exp_avg", means)
            self._write(parameter, "exp_avg_sq", squares)
        size = (squares / (1 - second**step)).sqrt_().add_(self._eps)
        weight.mul_(1 - lr * weight_decay)
        weight.addcdiv_(means, size, value=-lr / (1 - first**step))

    def _table(self, role: str, like: torch.Tensor) -> torch.Tensor:
        """Return the values of a moment's codes. Kept: a copy from the host would wait for the device."""
        key = role, like.dtype, like.device
        if key not in self._tables:
            self._tables[key] = torch.tensor(dynamic_table(role == "exp_avg"), dtype=like.dtype, device=like.device)
        return self._tables[key]

    def _held(self, parameter: NamedParameter, role: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a moment's codes and scales; of zeros where there are none."""
        state = self.state[parameter.tensor]
        if f"{role}_code" not in state:
            shape, like = parameter.tensor.shape, parameter.tensor
            # What `quantize` makes of zeros. It would take several fp32 tensors of the weight's size for it.
            zero = dynamic_table(role == "exp_avg").index(0.0)
            state[f"{role}_code"] = torch.full(shape, zero, dtype=torch.uint8, device=like.device)
            state[f"{role}_scale"] = like.new_zeros(shape[0], -(-shape[1] // self._block))
        return state[f"{role}_code"], state[f"{role}_scale"]

    def _read(self, parameter: NamedParameter, role: str) -> torch.Tensor:
        """Return a moment's values; zeros where there is none."""
        return dequantize(*self._held(parameter, role), self._table(role, parameter.tensor), self._block)

    def _write(self, parameter: NamedParameter, role: str, values: torch.Tensor) -> None:
        """Write a moment into its codes and scales, in place where they are."""
        state = self.state[parameter.tensor]
        for key, array in zip(("code", "scale"), quantize(values, self._table(role, values), self._block), strict=True):
            held = state.setdefault(f"{role}_{key}", array)
            if held is not array:
                held.copy_(array)


def _is_coded(parameter: NamedParameter, config: AdamW8bitConfig) -> bool:
    shape = parameter.global_shape
    return len(shape) == 2 and shape[0] * shape[1] >= config.min_size
