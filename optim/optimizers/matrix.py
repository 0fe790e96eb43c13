"""The base of optimizers that update the matrices of blocks as wholes, and everything else by AdamW."""

# pyright: reportPrivateImportUsage=false
# torch does not export its operations on lists (_foreach_…), which its own optimizers use.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim.adamw import adamw

from .adamw import FUSED_DEVICES, have_kernels
from .config import base_rate
from .matrix_config import MatrixOptimConfig
from .own_arrays import OwnArray
from .parameters import Matrix, NamedParameter, Shards, decay_groups

HIDDEN, ELEMENTWISE = "hidden", "elementwise"


class MatrixOptimizer(torch.optim.Optimizer):
    """Updates whole matrices of blocks by a method of its subclass; embeddings, head and vectors by AdamW.

    Weight decay is decoupled in both. AdamW's rate is `adamw_lr`, moved by the schedule as `lr` is; by default it is `lr`.
    For fp32 weights on a GPU with Triton the pointwise parts of the step are our own kernels, and it is a `FusedStep`.
    """

    gradient_scale: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    can_skip = False
    """True if `updates` obeys `taken`: false where the method decides on the host by the number of the step."""
    keeps_lr_scale = True
    """True if the factors of muP apply to matrices, too: not where the method itself makes steps independent of the width."""
    divides_parts = False
    """True if each of a matrix's `row_parts` is a matrix by itself."""

    def __init__(
        self, config: MatrixOptimConfig, parameters: Sequence[NamedParameter], shards: Shards, cost: Callable[[int, int], float]
    ) -> None:
        """cost: of a matrix, by its rows and columns, in any unit; matrices are shared out among ranks by it."""
        rate = base_rate(config)
        hidden = (parameter for parameter in parameters if parameter.hidden)
        self.hidden = [each if self.divides_parts else replace(each, row_parts=()) for each in hidden]
        names = {parameter.name for parameter in self.hidden}
        groups = decay_groups(parameters, config.weight_decay, lambda name: HIDDEN if name in names else ELEMENTWISE)
        for group in groups:
            if group["label"] == ELEMENTWISE and config.adamw_lr is not None:
                group["lr_scale"] = float(str(group["lr_scale"])) * config.adamw_lr / rate
            elif group["label"] == HIDDEN and not self.keeps_lr_scale:
                group["lr_scale"] = 1.0
        super().__init__(groups, {"lr": rate})
        self._betas, self._eps = tuple(config.adamw_betas), config.adamw_eps
        self._decay = {name: group["weight_decay"] for group in groups for name in group["names"]}  # type: ignore[attr-defined]
        self._compute_copies: dict[torch.Tensor, torch.Tensor]
        self._compute_copies = {each.tensor: each.compute_copy for each in parameters if each.compute_copy is not None}
        self._owned: dict[str, dict[str, torch.Tensor]] = {}  # role → name of the matrix → array
        self.matrices = shards.whole_matrices(self.hidden, cost)

    def updates_taken(self, matrix: Matrix) -> int:
        """Return the number of a matrix's updates, with the one under way."""
        return int(self.state[matrix.parameter.tensor]["step"])

    def owned_array(self, matrix: Matrix, role: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return an array of state of a matrix that this rank owns; of zeros, in the masters' dtype, at first.

        In checkpoints the arrays of stacked matrices are stacked along dim 0, as the matrices are. Of a matrix of `row_parts`
        an array has a row for each row.
        """
        held = self._owned.setdefault(role, {})
        if matrix.name not in held:
            held[matrix.name] = torch.zeros(shape, dtype=matrix.parameter.tensor.dtype, device=matrix.parameter.tensor.device)
        return held[matrix.name]

    def own_arrays(self) -> Iterator[OwnArray]:
        """Yield the arrays of this rank's matrices."""
        for role, held in self._owned.items():
            for matrix in self.matrices.owned:
                if matrix.name in held:
                    array = held[matrix.name]
                    rows, *others = array.shape
                    parts = matrix.parameter.row_parts
                    count = sum(parts) if parts else rows * matrix.parameter.stacked
                    whole, first = (count, *others), matrix.first_row if parts else rows * matrix.index
                    begin = (first, *(0 for _ in others))
                    yield OwnArray(matrix.parameter.name, role, array, whole, begin)

    def updates(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Compute what `lr` times is subtracted from each hidden parameter's shard, from the shards of the gradients.

        A collective: parallel to `hidden`, on every rank. By default each matrix is updated by `update_matrix`.

        gradients: as the engine left them; `complete_gradients` says what is pending
        """
        complete = self.complete_gradients(gradients)
        return self.matrices.map(
            complete, lambda matrices, whole: list(map(self.update_matrix, matrices, whole)), complete[0].dtype
        )

    def complete_gradients(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Return the hidden parameters' gradients in the masters' dtype, scaled, and all finite where the step is skipped.

        One that is missing is zero: no token reached that matrix, whose owner still waits for every part.
        """
        weights: list[torch.Tensor] = [parameter.tensor for parameter in self.hidden]
        complete = [
            torch.zeros_like(w) if grad is None else grad.to(w.dtype) for w, grad in zip(weights, gradients, strict=True)
        ]
        if self.gradient_scale is not None:
            torch._foreach_mul_(complete, self.gradient_scale)
        if self.skip is not None:  # what is not finite would be, times 0, too
            complete = [torch.where(self.skip > 0, 0.0, each) for each in complete]
        return complete

    def update_matrix(self, matrix: Matrix, gradient: torch.Tensor) -> torch.Tensor:
        """Compute what `lr` times is subtracted from a whole matrix that this rank owns, and move its state."""
        raise NotImplementedError

    @property
    def fused_step(self) -> bool:
        """True where our own kernels do the pointwise parts of the step: see `FusedStep`."""
        return have_kernels(weight for group in self.param_groups for weight in group["params"])

    @property
    def masked_step(self) -> bool:
        """See `MaskedStep`; what is not of blocks must have a fused kernel, ours or torch's."""
        held = (weight for group in self.param_groups if group["label"] == ELEMENTWISE for weight in group["params"])
        return self.can_skip and all(_is_fused(weight) for weight in held)

    def forget_steps(self, count: int) -> None:
        """See `MaskedStep`."""
        for state in self.state.values():
            state["step"] -= count

    @property
    def taken(self) -> torch.Tensor | None:
        """1 on the device if the step is taken, and 0 if not; None: it is."""
        return None if self.skip is None else 1 - self.skip

    def move(self, averages: Sequence[torch.Tensor], towards: Sequence[torch.Tensor], rate: float) -> None:
        """Move averages in place by a share of their distance to other tensors, unless the step is not taken."""
        taken = self.taken
        if taken is None:
            torch._foreach_lerp_(list(averages), list(towards), rate)
            return
        for average, other in zip(averages, towards, strict=True):
            if _keeps_numbers(average):
                average.lerp_(other, (taken.double() * rate).to(average.dtype))
            else:
                average.lerp_(torch.where(taken > 0, other, average), rate)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one update, with the exchanges of whole matrices."""
        assert closure is None
        fused = self.fused_step
        assert fused or self.gradient_scale is None, "only the fused step scales gradients"
        for group in self.param_groups:
            if group["label"] == ELEMENTWISE:
                self._step_elementwise(group, fused)
        if self.hidden:
            self._step_hidden(fused)
        self.gradient_scale = self.skip = None

    def _step_hidden(self, fused: bool) -> None:
        for parameter in self.hidden:
            state = self.state[parameter.tensor]
            state["step"] = state.get("step", 0) + 1
        updates = self.updates([parameter.tensor.grad for parameter in self.hidden])
        rates = {name: group["lr"] for group in self.param_groups for name in group["names"]}
        for parameter, update in zip(self.hidden, updates, strict=True):
            rate, weight = rates[parameter.name], parameter.tensor
            kept = 1 - rate * self._decay[parameter.name]
            if fused:
                from ...kernels.triton_matrix_update import weight_update

                weight_update(weight, update, self._compute_copies.get(weight), self.skip, keep=kept, rate=rate)
            else:
                self._move_weight(weight, update, kept, rate)

    def _move_weight(self, weight: torch.Tensor, update: torch.Tensor, kept: float, rate: float) -> None:
        """Decay a weight and take a step, unless the step is not taken: w ← kept·w − rate·update."""
        taken = self.taken
        if taken is None:
            weight.mul_(kept)
            weight.add_(update, alpha=-rate)
        elif _keeps_numbers(weight):
            weight.mul_(1 - taken.double() * (1 - kept))
            weight.addcmul_(update, taken.double() * -rate)
        else:
            decayed = (weight * kept).add_(update, alpha=-rate)
            weight.copy_(torch.where(taken > 0, decayed, weight))

    def _step_elementwise(self, group: dict[str, Any], fused: bool) -> None:
        weights: list[torch.Tensor] = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        for weight in weights:
            state = self.state[weight]
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            state["step"] = state.get("step", 0) + 1
        first, second = self._betas
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if fused:
            from ...kernels.triton_adamw import adamw_update

            settings: dict[str, Any] = {key: group[key] for key in ("lr", "weight_decay")}
            settings |= {"betas": (first, second), "eps": self._eps}
            for weight, gradient in zip(weights, gradients, strict=True):
                state, copy = self.state[weight], self._compute_copies.get(weight)
                moments, pending = (state["exp_avg"], state["exp_avg_sq"]), (self.gradient_scale, self.skip)
                adamw_update(weight, gradient, *moments, copy, *pending, step=state["step"], **settings)
            return
        one_kernel = all(map(_is_fused, weights))
        steps = [torch.full((), float(self.state[weight]["step"] - 1), device=weight.device) for weight in weights]
        means, squares = ([self.state[weight][role] for weight in weights] for role in ("exp_avg", "exp_avg_sq"))
        adamw(
            weights,
            gradients,
            exp_avgs=means,
            exp_avg_sqs=squares,
            max_exp_avg_sqs=[],
            state_steps=steps,
            foreach=not one_kernel,
            fused=one_kernel,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._eps,
            maximize=False,
            found_inf=self.skip if one_kernel else None,
        )


def _keeps_numbers(tensor: torch.Tensor) -> bool:
    """Return whether a number is as precise as a tensor of no dimensions beside this one: PyTorch rounds that to its dtype."""
    return tensor.dtype in (torch.float32, torch.float64)


def _is_fused(weight: torch.Tensor) -> bool:
    return weight.device.type in FUSED_DEVICES and weight.is_floating_point()
