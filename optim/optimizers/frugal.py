"""FRUGAL: AdamW for some columns of each matrix at a time, and the gradient's sign for the others (arXiv 2411.07837).

Of every `period` columns side by side one has moments, drawn anew every `interval` steps. The choice is a function of the
seed, the number of the interval and the matrix's width, so a rank knows its own columns, and nothing is exchanged.
Embeddings, head and vectors always have moments.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from ...config.problems import ConfigError, Problem
from .config import base_rate
from .elementwise import taken
from .frugal_config import FRUGALConfig
from .own_arrays import OwnArray
from .parameters import NamedParameter, Shards, decay_groups

ROLES = ("exp_avg", "exp_avg_sq")


class FRUGAL(torch.optim.Optimizer):
    """Adam's moments of one column in `period` of each matrix of a block, and signSGD for the others.

    w ← w − lr·(u + decay·w), where u is Adam's m̂ / (√v̂ + eps) in a column with moments, and `sign_scale` · sign(g) elsewhere

    Moments begin at zero with each choice. They are arrays (rows, columns / `period`), cut over ranks as the matrix is. A step
    can be skipped on the device (`MaskedStep`).
    Raises ConfigError where a rank's columns begin or end inside `period` of them.
    """

    masked_step = True
    skip: torch.Tensor | None = None

    def __init__(self, config: FRUGALConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._config, self._parameters = config, list(parameters)
        self._columns: dict[tuple[int, int, int, torch.device], tuple[int, torch.Tensor]] = {}
        cut = [each for each in parameters if each.hidden and each.cuts_columns_inside(config.period)]
        if cut:
            name, columns = cut[0].name, cut[0].tensor.shape[1]
            message = f"{config.period} does not divide the {columns} columns that a rank has of {name}"
            raise ConfigError([Problem("optim.period", message, "choose another, or another parallel.tp")])
        super().__init__(decay_groups(parameters, config.weight_decay), {"lr": base_rate(config)})

    def own_arrays(self) -> Iterator[OwnArray]:
        """Yield the moments of matrices."""
        for parameter in self._parameters:
            if parameter.hidden and ROLES[0] in self.state[parameter.tensor]:
                (rows, columns), (row, column) = parameter.global_shape, parameter.offsets
                shape, begin = (rows, -(-columns // self._config.period)), (row, column // self._config.period)
                for role in ROLES:
                    yield OwnArray(parameter.name, role, self.state[parameter.tensor][role], shape, begin)

    def forget_steps(self, count: int) -> None:
        """See `MaskedStep`."""
        for state in self.state.values():
            state["step"] -= count

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one update."""
        assert closure is None
        settings = {name: (group["lr"], group["weight_decay"]) for group in self.param_groups for name in group["names"]}
        for parameter in self._parameters:
            state, weight = self.state[parameter.tensor], parameter.tensor
            state["step"] = step = state.get("step", 0) + 1
            if ROLES[0] not in state:
                columns = -(-weight.shape[1] // self._config.period) if parameter.hidden else 0
                like = weight.new_zeros(weight.shape[0], columns) if parameter.hidden else torch.zeros_like(weight)
                state.update({role: torch.zeros_like(like) for role in ROLES})
            if parameter.hidden and (step - 1) % self._config.interval == 0:  # whether or not the weight is used in this step
                for role in ROLES:
                    if self.skip is None:
                        state[role].zero_()
                    else:
                        state[role].masked_fill_(self.skip == 0, 0.0)
            if weight.grad is not None:
                gradient = weight.grad.to(weight.dtype)
                if self.skip is not None:  # it may be NaN
                    gradient = gradient.where(self.skip == 0, 0.0)
                self._step(parameter, gradient, *settings[parameter.name])
        self.skip = None

    def _step(self, parameter: NamedParameter, gradient: torch.Tensor, lr: float, weight_decay: float) -> None:
        weight, state = parameter.tensor, self.state[parameter.tensor]
        step, (first, second) = state["step"], self._config.betas
        means, squares = (state[role] for role in ROLES)
        once = taken(self.skip, weight)
        whole, columns = gradient, None
        if parameter.hidden:
            number, since = divmod(step - 1, self._config.interval)
            step = since + 1
            columns = self._columns_of(parameter, number)
            gradient = whole.index_select(1, columns)
        means.mul_(1 - (1 - first) * once).add_(gradient, alpha=1 - first)
        squares.mul_(1 - (1 - second) * once).addcmul_(gradient, gradient, value=1 - second)
        update = means / (squares.sqrt().div_(math.sqrt(1 - second**step)).add_(self._config.eps)) / (1 - first**step)
        if columns is not None:
            update = (whole.sign() * self._config.sign_scale).index_copy_(1, columns, update)
        weight.mul_(1 - lr * weight_decay * once).add_(update.mul_(once), alpha=-lr)

    def _columns_of(self, parameter: NamedParameter, number: int) -> torch.Tensor:
        """Return which columns of a rank's shard have moments in an interval, in order: int64, on the shard's device.

        Kept: matrices of equal width share a choice, and a copy from the host would wait for the device.
        """
        width, begin, mine = parameter.global_shape[1], parameter.offsets[1], parameter.tensor.shape[1]
        key = width, begin, mine, parameter.tensor.device
        if self._columns.get(key, (-1,))[0] != number:
            period = self._config.period
            chosen = choose_columns(self._config.seed, number, width, period)
            local = chosen[begin // period : -(-(begin + mine) // period)] - begin
            self._columns[key] = number, local.to(parameter.tensor.device)
        return self._columns[key][1]


def choose_columns(seed: int, number: int, width: int, period: int) -> torch.Tensor:
    """Draw one column of every `period`, by (seed, number, width) alone: (⌈width / period⌉,) int64, rising."""
    digest = hashlib.blake2b(f"{seed}/{number}/{width}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    begins = torch.arange(0, width, period)
    sizes = (width - begins).clamp(max=period)
    return begins + torch.randint(1 << 31, begins.shape, generator=generator) % sizes
