"""An optimizer with arrays of every shape that a checkpoint must take: factored, whole on one owner, one for the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from meshloom.optim.optimizers.own_arrays import RUN, OwnArray
from meshloom.optim.optimizers.parameters import NamedParameter, Shards, decay_groups

BETA = 0.9
EPS = 1e-8
BINS = 5


class Factored(torch.optim.Optimizer):
    """Adafactor's factored second moments (Shazeer and Stern, arXiv 1804.04235) without its clipping and relative steps.

    Matrices: V = R Cᵀ / ΣR, where R and C are moving averages of the row and column sums of g². Vectors: Adam's second moment.
    In addition every update is damped by a whole-matrix average of g that only one rank holds, and by a histogram of the
    gradients' logarithms over the whole run.

    owns  whether this rank is the one that holds a parameter's whole-matrix average
    """

    def __init__(
        self, parameters: Sequence[NamedParameter], shards: Shards, lr: float, owns: Callable[[int], bool] = lambda _: True
    ) -> None:
        self._parameters, self._shards = parameters, shards
        self._owns = {parameter.name: owns(number) for number, parameter in enumerate(parameters)}
        super().__init__(decay_groups(parameters, 0.0), {"lr": lr})
        self.histogram = torch.zeros(BINS, dtype=torch.float64)

    def own_arrays(self) -> Iterator[OwnArray]:
        """Rows, columns, whole averages, and the run's histogram."""
        for parameter in self._parameters:
            state = self.state[parameter.tensor]
            if "row" in state:
                yield OwnArray.along(parameter, "row", state["row"], [0])
                yield OwnArray.along(parameter, "column", state["column"], [1])
            if "whole" in state:
                shape = parameter.global_shape
                yield OwnArray(parameter.name, "whole", state["whole"], shape, (0,) * len(shape))
        yield OwnArray("histogram", RUN, self.histogram, (BINS,), (0,))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update."""
        assert closure is None
        rate = {tensor: group["lr"] for group in self.param_groups for tensor in group["params"]}
        counted = torch.zeros(BINS, dtype=torch.float64)
        updates: list[tuple[NamedParameter, torch.Tensor]] = []
        for parameter in self._parameters:
            gradient = parameter.tensor.grad
            assert gradient is not None
            whole = self._shards.gather(parameter, gradient)
            counted += torch.histc(whole.abs().clamp(min=1e-12).log10(), BINS, min=-12, max=0)
            updates.append((parameter, self._direction(parameter, gradient, whole)))
        self.histogram.mul_(BETA).add_(self._shards.across_stages(counted), alpha=1 - BETA)
        damping = 1 + float(self.histogram[-1] / self.histogram.sum().clamp(min=1e-12))
        for parameter, update in updates:
            parameter.tensor.add_(update, alpha=-rate[parameter.tensor] / damping)

    def _direction(self, parameter: NamedParameter, gradient: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        state: dict[str, Any] = self.state[parameter.tensor]
        state["step"] = state.get("step", 0) + 1
        if self._owns[parameter.name]:
            average = state.setdefault("whole", torch.zeros_like(whole))
            average.lerp_(whole, 1 - BETA)
            kept = average.square().sum()
        else:
            kept = whole.new_zeros(())
        # The sum of the owners' words over their number: `sum` divides both by the copies of the parameter.
        told = torch.stack([kept, whole.new_tensor(float(self._owns[parameter.name]))])
        sums = self._shards.sum(told[None], [parameter])[0]
        strength = (sums[0] / sums[1]).sqrt()
        squares = whole.square()
        if whole.dim() == 2:
            rows, columns = parameter.tensor.shape
            begin, left = parameter.offsets
            row = state.setdefault("row", gradient.new_zeros(rows))
            column = state.setdefault("column", gradient.new_zeros(columns))
            row.lerp_(squares.sum(1)[begin : begin + rows], 1 - BETA)
            column.lerp_(squares.sum(0)[left : left + columns], 1 - BETA)
            total = column.sum() if columns == whole.shape[1] else self._whole_sum(parameter, column, left)
            moment = torch.outer(row, column) / total.clamp(min=1e-30)
        else:
            moment = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
            moment.lerp_(gradient.square(), 1 - BETA)
        return gradient / (moment.sqrt() + EPS) / (1 + strength)

    def _whole_sum(self, parameter: NamedParameter, column: torch.Tensor, left: int) -> torch.Tensor:
        """Sum of the whole column moment of a matrix that is cut along its columns."""
        line = torch.zeros(1, parameter.global_shape[1], dtype=column.dtype)
        count = torch.zeros_like(line)
        line[0, left : left + len(column)], count[0, left : left + len(column)] = column, 1
        sums = self._shards.sum(torch.cat([line, count]).view(1, 2, -1), [parameter])[0]
        return (sums[0] / sums[1].clamp(min=1e-12)).sum()
