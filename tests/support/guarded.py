"""Faults in runs of `parity`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from meshloom.parallel.engine import Engine
from support import parity


def poison(parameter: torch.nn.Parameter, factor: Callable[[], float]) -> None:
    """Multiply a parameter's gradient on this rank, before it is exchanged."""

    def multiply(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * factor()

    parameter.register_hook(multiply)


class BadSamples:
    """Multiplies what a layer computes of some samples, in their rows, on whatever rank they are, or just its gradient.

    Samples are known by their tokens, which are drawn from their numbers.
    """

    def __init__(
        self, engine: Engine, layer: int, samples: Sequence[int], factor: float = torch.nan, *, gradient: bool = False
    ) -> None:
        self._gradient = gradient
        self._rows = [torch.from_numpy(parity.sample(index).tokens) for index in samples]
        self._factor = factor
        self._bad_B = torch.zeros(1, dtype=torch.bool)
        engine.module.register_forward_pre_hook(self._look)
        engine.module.block_modules()[layer].register_forward_hook(self._spoil)  # type: ignore[operator]

    @property
    def are_here(self) -> bool:
        """Return whether one of the samples is in the newest micro-batch."""
        return bool(self._bad_B.any())

    def _look(self, _module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        self._bad_B = torch.stack([(inputs[0] == row).all(1) for row in self._rows]).any(0)

    def _spoil(self, _module: object, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> Any:
        x_BSD = output[0] if isinstance(output, tuple) else output
        # One product, whose gradient is finite in the rows of other samples; that of torch.where would not be.
        factor_B11 = torch.where(self._bad_B, self._factor, 1.0).to(x_BSD.dtype)[:, None, None]
        spoilt_BSD = x_BSD + (factor_B11 - 1) * (x_BSD - x_BSD.detach()) if self._gradient else x_BSD * factor_B11
        return (spoilt_BSD, *output[1:]) if isinstance(output, tuple) else spoilt_BSD
