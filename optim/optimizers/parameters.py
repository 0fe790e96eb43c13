"""The interface between engines and optimizers: named local shards, and sums and gathers over all shards.

Engines own the sharding; optimizers own the mathematics. Rule R4 defines an update on whole parameters. So an optimizer
whose update needs more than the local elements (a norm, a projection, an orthogonalisation) uses `Shards`, and never learns
what a rank is.

What engines rely on in any `torch.optim.Optimizer`, built as `Class(parameters=…, shards=…, **settings)`:

- each parameter group has `lr_scale`; before `step()` the engine sets `group["lr"]` to the scheduled rate times it;
- `optimizer.state[parameter.tensor]` holds three kinds of things. Tensors shaped as the local shard are elementwise and lie
  in the shard's box of the parameter's global shape (checkpointed as arrays). Numbers and 0-dim tensors are counters: the
  same for every parameter and on every rank (checkpointed once). An array of any other shape or cut must be declared
  (`own_arrays.py`), and so must one that belongs to no parameter;
- a first `step()` with zero gradients at rate 0 makes all state without changing a weight. A later `step()` uses what was
  then written into that state in place (a counter that is a Python number may be replaced). Engines do so before a restore,
  and then set every counter to 0, or to what `InitialCounters` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from ...kernels.rounding import KeptWeight


@dataclass(eq=False)
class NamedParameter:
    """One parameter as this rank holds it.

    name          canonical name
    tensor        local shard, a plain leaf Parameter; its `.grad` is the local shard of the gradient
    global_shape  shape of the whole parameter
    decay         whether weight decay applies (matrices yes; norms, biases and embeddings no)
    lr_scale      factor on the learning rate (muP); 1 otherwise
    compute_copy  the copy of the shard, in lower precision, that the forward pass reads; None: it reads `tensor`
    offsets       where the shard begins in the whole parameter; (): at its beginning
    stacked       matrices of equal shape that the whole stacks along its rows; a norm or projection is of each by itself
    hidden        whether it is a matrix (or a stack) within a block: not of an embedding or the head, and no vector
    stored        what checkpoints hold in the place of `tensor`, which then has no memory between updates; None: `tensor`
    row_parts     rows of each part that a matrix joins one below the other: heads, or projections; (): it has none
    compute       dtype of the forward pass; None: that of `tensor`
    """

    name: str
    tensor: torch.nn.Parameter
    global_shape: tuple[int, ...]
    decay: bool = True
    lr_scale: float = 1.0
    compute_copy: torch.Tensor | None = None
    offsets: tuple[int, ...] = ()
    stacked: int = 1
    hidden: bool = False
    compute: torch.dtype | None = None
    row_parts: tuple[int, ...] = ()
    stored: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.offsets = self.offsets or (0,) * len(self.global_shape)

    def matrix_of_rows(self) -> torch.Tensor:
        """Return the index of the stacked matrix that each row of the shard belongs to: (rows,) int64."""
        rows = torch.arange(self.tensor.shape[0], device=self.tensor.device) + self.offsets[0]
        return rows // (self.global_shape[0] // self.stacked)

    def cuts_columns_inside(self, block: int) -> bool:
        """Return whether this rank's columns begin or end inside a block of the whole matrix."""
        begin = self.offsets[1]
        end = begin + self.tensor.shape[1]
        return bool(begin % block or (end % block and end != self.global_shape[1]))


@runtime_checkable
class FusedStep(Protocol):
    """An optimizer whose `step()` also scales gradients and writes compute copies, sparing the engine passes over memory."""

    @property
    def fused_step(self) -> bool:
        """True if `step()` takes gradients of lower precision, scales them, and writes every `compute_copy`."""
        ...

    gradient_scale: torch.Tensor | None
    """One number on the device that the next `step()`, and only that, multiplies gradients by; None: 1."""


@runtime_checkable
class MaskedStep(Protocol):
    """An optimizer whose `step()` can be skipped on the device, without the host knowing: see `trainer/guard`."""

    @property
    def masked_step(self) -> bool:
        """True if `step()` obeys `skip`."""
        ...

    skip: torch.Tensor | None
    """One fp32 number on the device: where it is 1, the next `step()`, and only that, changes no weight or state; None: 0."""

    def forget_steps(self, count: int) -> None:
        """Take the last steps, all of them skipped, out of counts that the host keeps."""
        ...


@runtime_checkable
class RoundedStep(Protocol):
    """An optimizer whose `step()` can update bf16 weights that have no fp32 masters: see `kernels/rounding.py`."""

    @property
    def rounded_step(self) -> bool:
        """True if `step()` obeys `kept`."""
        ...

    kept: Mapping[torch.Tensor, KeptWeight] | None
    """Numbers that the next `step()`, and only that, reads and writes in the place of weights, by weight; None: the weights."""


@runtime_checkable
class AveragesWeights(Protocol):
    """An optimizer that trains at weights which differ from those that are evaluated and saved, an average of the past.

    Both methods change all weights of this rank, and the engine then gathers them. The averages survive either.
    """

    average_role: str
    """Key of a weight's average in `optimizer.state`, from the first `step()` on. Checkpoints store it as the weight."""

    def hold_averages(self) -> None:
        """Put the averages into the weights, for an evaluation."""
        ...

    def hold_training_weights(self) -> None:
        """Put into the weights what the next step's gradients are computed at, from the averages and other state."""
        ...


@runtime_checkable
class InitialCounters(Protocol):
    """An optimizer some of whose counters do not begin at 0."""

    def initial_counters(self) -> dict[str, float]:
        """Return the values of those counters before the first update."""
        ...


@runtime_checkable
class ComparesHalves(Protocol):
    """An optimizer that measures how much two halves of a batch disagree."""

    @property
    def wants_halves(self) -> bool:
        """True if the step about to be taken is measured."""
        ...

    def observe_halves(self, first: Sequence[torch.Tensor]) -> None:
        """Compare the gradients of a batch's halves, before they are clipped.

        first: that of the first half, in the order of the parameters, sharded and scaled as their `.grad`, which holds the sum.
        """
        ...


def initial_counter_values(optimizer: torch.optim.Optimizer, counters: Iterable[str]) -> dict[str, float]:
    """Return the values of an optimizer's counters before its first update."""
    known = optimizer.initial_counters() if isinstance(optimizer, InitialCounters) else {}
    return {name: known.get(name, 0.0) for name in counters}


@dataclass(frozen=True)
class Matrix:
    """One whole matrix: a parameter, or one of those that it stacks, or of its `row_parts`.

    index  number of the matrix in the stack, or of the part
    """

    parameter: NamedParameter
    index: int = 0

    @property
    def name(self) -> str:
        """The parameter's name, with the matrix's number where it stacks several."""
        whole = self.parameter.stacked == 1 and not self.parameter.row_parts
        return self.parameter.name if whole else f"{self.parameter.name}[{self.index}]"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        rows, columns = self.parameter.global_shape
        if self.parameter.row_parts:
            return self.parameter.row_parts[self.index], columns
        return rows // self.parameter.stacked, columns

    @property
    def first_row(self) -> int:
        """The row of the parameter at which the matrix begins."""
        if self.parameter.row_parts:
            return sum(self.parameter.row_parts[: self.index])
        return self.index * self.shape[0]


WAVE = 1 << 26
"""Elements of the matrices that a rank computes together, at most, or one matrix: 128 MiB in bf16."""

MatrixFunction = Callable[[Sequence[Matrix], Sequence[torch.Tensor]], Sequence[torch.Tensor]]
"""A function of whole matrices, some at a time: their arrays in, arrays of the same shapes out."""


class WholeMatrices(Protocol):
    """Matrices whose parts lie on many ranks, each computed as a whole by the one rank that owns it.

    owned  the matrices of this rank
    """

    owned: Sequence[Matrix]

    def map(self, parts: Sequence[torch.Tensor], function: MatrixFunction, dtype: torch.dtype) -> list[torch.Tensor]:
        """Apply a function to every whole matrix, and return this rank's parts of the results.

        parts: parallel to the parameters, shaped as the local shards; they travel, and are computed, in `dtype`.
        """
        ...


class Shards(Protocol):
    """Collectives over the shards of the same parameters on other ranks. Every rank must call the same ones, in order."""

    def sum(self, values: torch.Tensor, parameters: Sequence[NamedParameter]) -> torch.Tensor:
        """Sum per-parameter values (len(parameters), …) over all shards of each parameter, in one collective.

        Replicas are counted once. `parameters` are those this rank was given, or a subset of them chosen by a rule that is
        the same on every rank.
        """
        ...

    def across_stages(self, values: torch.Tensor) -> torch.Tensor:
        """Sum totals over this rank's parameters, taken from `sum`, over the parameters of all pipeline stages.

        Without stages this is the identity.
        """
        ...

    def gather(self, parameter: NamedParameter, local: torch.Tensor) -> torch.Tensor:
        """Gather the whole array (global_shape) from tensors shaped as the local shards."""
        ...

    def scatter(self, parameter: NamedParameter, whole: torch.Tensor) -> torch.Tensor:
        """Return the part of the whole array (global_shape) that lies in this rank's shard. No communication."""
        ...

    def whole_matrices(self, parameters: Sequence[NamedParameter], cost: Callable[[int, int], float]) -> WholeMatrices:
        """Give each matrix of these parameters to one of the ranks that hold it, so that costs are balanced.

        cost: of a matrix, from its rows and columns, in any unit.
        """
        ...


class Unsharded:
    """Shards of parameters that are whole on this rank: every sum is already global."""

    def sum(self, values: torch.Tensor, parameters: Sequence[NamedParameter]) -> torch.Tensor:
        """Return the values unchanged."""
        return values

    def across_stages(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values unchanged."""
        return values

    def gather(self, parameter: NamedParameter, local: torch.Tensor) -> torch.Tensor:
        """Return the local array unchanged."""
        return local

    def scatter(self, parameter: NamedParameter, whole: torch.Tensor) -> torch.Tensor:
        """Return the whole array unchanged."""
        return whole

    def whole_matrices(self, parameters: Sequence[NamedParameter], cost: Callable[[int, int], float]) -> WholeMatrices:
        """Own all matrices."""
        return LocalMatrices(parameters)


def matrices_of(parameters: Sequence[NamedParameter]) -> list[Matrix]:
    """List the matrices of parameters, those of a stack one after another."""
    assert not any(each.row_parts and each.stacked > 1 for each in parameters), "a stack's matrices have no parts"
    return [Matrix(each, index) for each in parameters for index in range(len(each.row_parts) or each.stacked)]


def _matrices_in(parameter: NamedParameter, whole: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return views of the matrices of a whole parameter."""
    return whole.split(list(parameter.row_parts)) if parameter.row_parts else whole.chunk(parameter.stacked)


def number_waves(matrices: Sequence[Matrix], owners: Sequence[int]) -> list[int]:
    """Number the wave of each matrix: as many of an owner's are in one as `WAVE` elements hold.

    An owner's matrices are taken by shape, the largest first, so that a wave has many of one shape: they are computed together.
    """
    begun: dict[int, tuple[int, int]] = {}  # owner → its current wave, and the elements in it
    numbers = [0] * len(matrices)
    shapes = [matrix.shape for matrix in matrices]
    for number in sorted(range(len(shapes)), key=lambda each: (-shapes[each][0] * shapes[each][1], shapes[each], each)):
        rows, columns = shapes[number]
        wave, filled = begun.get(owners[number], (0, 0))
        if filled and filled + rows * columns > WAVE:
            wave, filled = wave + 1, 0
        begun[owners[number]] = wave, filled + rows * columns
        numbers[number] = wave
    return numbers


class LocalMatrices:
    """`WholeMatrices` of parameters that are whole on this rank."""

    def __init__(self, parameters: Sequence[NamedParameter]) -> None:
        self._parameters = parameters
        self.owned: Sequence[Matrix] = matrices_of(parameters)
        self._waves: list[list[int]] = []
        for number, wave in enumerate(number_waves(self.owned, [0] * len(self.owned))):
            self._waves.extend([] for _ in range(wave + 1 - len(self._waves)))
            self._waves[wave].append(number)

    def map(self, parts: Sequence[torch.Tensor], function: MatrixFunction, dtype: torch.dtype) -> list[torch.Tensor]:
        """Apply the function to some matrices at a time: as many as `WAVE` elements hold, or one."""
        results = [torch.empty_like(part, dtype=dtype) for part in parts]
        homes = [
            home
            for parameter, part, result in zip(self._parameters, parts, results, strict=True)
            for home in zip(_matrices_in(parameter, part), _matrices_in(parameter, result), strict=True)
        ]
        for wave in self._waves:
            whole = [homes[number][0].to(dtype) for number in wave]
            for number, result in zip(wave, function([self.owned[number] for number in wave], whole), strict=True):
                homes[number][1].copy_(result)
        return results


def decay_groups(
    parameters: Sequence[NamedParameter], weight_decay: float, label: Callable[[str], str] | None = None
) -> list[dict[str, object]]:
    """Make the groups of a `torch.optim.Optimizer`: one per (decay, lr_scale, label of the name), in a fixed order.

    Each group carries `lr_scale` (the engine multiplies the scheduled rate by it), `label`, and `names`, parallel to
    `params`.
    """

    def key(parameter: NamedParameter) -> tuple[bool, float, str]:
        return parameter.decay, parameter.lr_scale, label(parameter.name) if label else ""

    groups: list[dict[str, object]] = []
    for decay, lr_scale, name in sorted({key(parameter) for parameter in parameters}, reverse=True):
        members = [parameter for parameter in parameters if key(parameter) == (decay, lr_scale, name)]
        groups.append(
            {
                "params": [member.tensor for member in members],
                "names": [member.name for member in members],
                "weight_decay": weight_decay if decay else 0.0,
                "lr_scale": lr_scale,
                "label": name,
            }
        )
    return groups


def members_with_gradients(
    group: Mapping[str, Any], by_name: Mapping[str, NamedParameter]
) -> tuple[list[NamedParameter], list[torch.Tensor], list[torch.Tensor]]:
    """List the members of a parameter group that have a gradient, their weights and their gradients, as parallel lists."""
    members = [member for member in (by_name[name] for name in group["names"]) if member.tensor.grad is not None]
    weights: list[torch.Tensor] = [member.tensor for member in members]
    return members, weights, [weight.grad for weight in weights if weight.grad is not None]
