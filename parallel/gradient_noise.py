"""Second moments of a step's gradient, measured in the backward pass. The batch-size controllers decide from them.

The workers are the micro-batches of the whole global batch, on whichever rank they run, so the numbers depend on
batch.micro alone and not on the layout. Blank micro-batches are no workers. A hook on every unsharded weight sees the
gradient of one micro-batch before anything is added to it or reduced: that is DDP-Norm's and FSDP-Norm's quantity (arXiv
2412.21124) for every ZeRO stage, one kernel per weight and micro-batch, and one number per rank in the collective that the
gradient's norm needs anyway.

Context-parallel ranks each have a part of a worker's gradient. They sum it weight by weight in the hooks (`worker_sums.py`),
as the square of a sum does not follow from the squares of its parts. Each gets a piece of the sum, and takes that piece's
product with the same piece of the whole gradient. Under hybrid data parallelism a measured step is dealt worker by worker, so
that a group of ranks shares its workers in the same way (`Share.worker_rows`).

Not seen: a tied embedding cut by a pipeline, whose two parts add up on neither rank. `limits.measuring_problems` refuses it.
A weight that a micro-batch does not use is refused in the first measured step that meets one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from zlib import crc32

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from ..config.problems import ConfigError, Problem
from ..data.assignment import Share, WorkerRows
from ..optim.batch.statistics import GradientStatistics
from .mesh import Mesh
from .observers import GradientObserver
from .shards import Placed, Placements, own_part, placements_of
from .worker_sums import WorkerRanks


class Measure(Enum):
    """The measurement that is asked of a step: nothing; Σ‖L_j‖²; or also the products with the whole gradient."""

    NOTHING = 0
    SQUARES = 1
    PROJECTIONS = 2


@dataclass(frozen=True)
class Moments:
    """The moments that a step measured, on the device. They reach the host with the step's loss, while the update runs.

    samples  of the global batch; workers: micro-batches it was cut into, on all ranks
    scalars  the moments, by their names in `GradientStatistics`
    """

    samples: int
    workers: int
    scalars: Mapping[str, torch.Tensor]

    def statistics(self, numbers: Mapping[str, float]) -> GradientStatistics:
        """Build the record from numbers among which those of `scalars` are found by name."""
        own = {name: numbers[name] for name in self.scalars}
        return GradientStatistics(**own, workers=self.workers, worker_samples=self.samples / self.workers)

    def read(self) -> GradientStatistics:
        """Build the record. Waits for the device."""
        return self.statistics({name: float(scalar) for name, scalar in self.scalars.items()})


@dataclass(frozen=True)
class _Turn:
    """The part of a micro-batch in the workers of its rank.

    worker  of which it is a part; None: it is blank on all ranks that share workers with this one
    last    whether it is the last of the worker's micro-batches
    """

    worker: int | None
    last: bool

    @property
    def blank(self) -> bool:
        return self.worker is None


def _turns(workers: Sequence[int | None]) -> list[_Turn]:
    return [_Turn(here, here != after) for here, after in zip(workers, [*workers[1:], None], strict=True)]


class GradientNoise(GradientObserver):
    """The norm of a step's gradient and, in steps that are asked to, the moments of its micro-batches', in one collective.

    An engine registers every unsharded weight (`watch`). In each step it sets `measure`, calls `begin` before the first
    forward pass, `norm` after the last backward pass, and `moments`.

    measure  what the step is asked for
    """

    def __init__(self, mesh: Mesh, placed: Mapping[str, Placed], gradient_scale: float = 1.0) -> None:
        """gradient_scale: what the engine multiplies a micro-batch's gradient by, to divide by it again later."""
        self._mesh = mesh
        self._scale = gradient_scale
        self._index = {name: number for number, name in enumerate(placed)}
        repeats = [self._copies_over_tp(each.parameter) for each in placed.values()]
        self._per_copy = 1 / torch.tensor(repeats, dtype=torch.float64, device=mesh.device)
        self._watched: set[nn.Parameter] = set()
        self.measure = Measure.NOTHING
        self._sums: torch.Tensor | None = None
        self._order: list[int] | None = []  # of the weights whose sums were started in the first measured step; None: checked
        self._arriving: tuple[int, _Turn, Callable[[], torch.Tensor]] | None = None  # of the weight of an index, a piece

    def _copies_over_tp(self, parameter: nn.Parameter) -> int:
        size = self._mesh.size("tp")
        if size == 1 or not isinstance(parameter, DTensor):
            return size
        names = parameter.device_mesh.mesh_dim_names or ()
        sharded = "tp" in names and isinstance(parameter.placements[names.index("tp")], Shard)
        return 1 if sharded else size

    def watch(self, name: str, weight: nn.Parameter) -> None:
        """Register a hook on the gradient of this unsharded weight; once per weight."""
        if weight not in self._watched:
            self._watched.add(weight)
            weight.register_hook(self._seen(self._index[name], placements_of(weight)))

    def _seen(self, index: int, placements: Placements | None) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def hook(gradient: torch.Tensor) -> None:
            if self.measure is Measure.NOTHING:
                return
            mine = own_part(gradient, placements)
            accum_dtype = torch.promote_types(mine.dtype, torch.float32)
            turn = self._turns[self._seen_rows[index]]
            self._seen_rows[index] += 1
            if self._sharers.count == 1:
                self._add(index, turn, mine, accum_dtype)
            else:  # the last weight's sum arrived while this gradient was computed, unless a rank is slow
                if self._order is not None:
                    self._order.append(index)
                with self._mesh.compute_time.waiting():
                    self._finish_sum()
                self._arriving = index, turn, self._sharers.start_sum(mine, accum_dtype, nothing=turn.blank)

        return hook

    def _finish_sum(self) -> None:
        """Wait for the sum under way, and take in this rank's piece."""
        if self._arriving is not None:
            index, turn, wait = self._arriving
            self._arriving, piece = None, wait()
            self._add(index, turn, piece, piece.dtype)

    def _add(self, index: int, turn: _Turn, part: torch.Tensor, accum_dtype: torch.dtype) -> None:
        """Take in one row's gradient of a weight, or this rank's piece of it; the norm is taken of all rows of a worker."""
        if turn.blank:
            return
        before = self._rows_before[index]
        if before is not None:
            part = before.add_(part)
        if turn.last:
            self._norms[index].append(torch.linalg.vector_norm(part, dtype=accum_dtype))
            self._rows_before[index] = None
            if self.measure is Measure.PROJECTIONS:
                self._kept[index].append(part.to("cpu", accum_dtype, copy=True))
        elif before is None:
            self._rows_before[index] = part.to(accum_dtype, copy=True)

    def begin(self, share: Share, global_tokens: torch.Tensor) -> None:
        """Clear the last step, and record each worker's share of the tokens, in the order of their backward passes."""
        self._sums = self._arriving = None
        if self.measure is Measure.NOTHING:
            return
        assert share.workers, "the step was not dealt by worker"
        rows = share.worker_rows
        self._dealt, self._sharers = rows, self._sharers_of(rows)
        self._turns = _turns(range(len(share.micro_batches)) if rows is None else rows.turns)
        self._seen_rows = [0] * len(self._index)
        self._rows_before: list[torch.Tensor | None] = [None] * len(self._index)
        self._norms: list[list[torch.Tensor]] = [[] for _ in self._index]
        self._kept: list[list[torch.Tensor]] = [[] for _ in self._index]
        self._workers = share.workers
        tokens = [0] * sum(turn.last and not turn.blank for turn in self._turns)
        for turn, batch in zip(self._turns, share.micro_batches, strict=True):
            if turn.worker is not None:
                tokens[turn.worker] += batch.valid_tokens
        tokens_K = self._on_device(tokens, torch.float64)
        if rows is not None:  # context-parallel ranks have each counted those of whole samples
            self._own_K = self._on_device(rows.own, torch.int64)
            tokens_K = self._sum_over_sharers(tokens_K)
        shares = tokens_K / global_tokens
        # A worker without a target (a blank one) has no gradient: its square of 0 is divided by anything but 0.
        self._shares_K = torch.where(shares > 0, shares, 1.0)

    def _on_device(self, numbers: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Copy numbers from pinned memory: any other copy to a GPU waits until it has done all that was queued before."""
        held = torch.tensor(numbers, dtype=dtype, pin_memory=self._mesh.device.type == "cuda")
        return held.to(self._mesh.device, non_blocking=True)

    def _sharers_of(self, rows: WorkerRows | None) -> WorkerRanks:
        """Return the ranks that share this rank's workers."""
        if rows is None:
            size = self._mesh.size("cp")
            return WorkerRanks() if size == 1 else WorkerRanks(self._mesh.group("cp"), 0, size)
        data_rank = self._mesh.data_rank
        return WorkerRanks(self._mesh.group("data"), data_rank - data_rank % rows.ranks, rows.ranks)

    def _sum_over_sharers(self, numbers_K: torch.Tensor) -> torch.Tensor:
        """Sum numbers of this rank's workers over the ranks that share them. Every rank must call it."""
        if self._dealt is None:
            return self._mesh.sum(numbers_K, "cp")
        all_J = numbers_K.new_zeros(self._workers).index_copy(0, self._own_K, numbers_K)
        return self._mesh.sum(all_J, "data")[self._own_K]

    def norm(self, squares: torch.Tensor) -> torch.Tensor:
        """Compute the norm of the whole gradient. squares: this rank's part of its square, to be summed over all processes."""
        if self.measure is Measure.NOTHING:
            return self._mesh.sum(squares).sqrt()
        self._sums = self._mesh.sum(torch.stack([squares, self._worker_squares()]))
        return self._sums[0].sqrt()

    def moments(self, samples: int, whole_gradients: Sequence[Callable[[], torch.Tensor]] = ()) -> Moments | None:
        """Return what `norm` summed and, where asked for, the projections. None if nothing was measured or there is one worker.

        Call it once. whole_gradients: see `projection_square`.
        """
        sums, self._sums = self._sums, None
        if sums is None or self._workers < 2:
            return None
        scalars = {"batch_square": sums[0], "worker_square": sums[1]}
        if self.measure is Measure.PROJECTIONS:
            scalars["projection_square"] = self.projection_square(whole_gradients)
        return Moments(samples, self._workers, scalars)

    def _worker_squares(self) -> torch.Tensor:
        """Compute this rank's part of Σ_j ‖L_j‖² / w_j over all ranks' micro-batches, to be summed over all processes."""
        self._finish_sum()
        self._compare_order()
        assert self._watched, "no gradient is seen; was the engine built with `measures`?"
        self._refuse_unused()
        assert all(before is None for before in self._rows_before), "a worker is not complete"
        stacked = torch.stack([norm for norms in self._norms for norm in norms])  # one stack per weight would be a kernel each
        norms_PK = stacked.view(len(self._norms), -1).double() / self._scale
        return (norms_PK.square() * self._per_copy.unsqueeze(1) / self._shares_K).sum()

    def _refuse_unused(self) -> None:
        """Raise ConfigError if a micro-batch used some weight not at all: which one it was can't be told by the hooks.

        Models of a user's own may do that (`models.protocol.may_skip_weights`). Only the ranks that see it raise.
        """
        for name, norms in zip(self._index, self._norms, strict=True):
            if len(norms) != len(self._shares_K):
                text = f"the gradient's noise can't be measured: {name} is not used in every micro-batch"
                fix = "use batch=fixed, stages, ramp or critical_loss, or a model that uses all its weights"
                raise ConfigError([Problem("batch", text, fix)])

    def _compare_order(self) -> None:
        """In the first measured step compare the order of sums over the ranks that share workers. All ranks must call it.

        Sums are matched by their order alone. Autograd's follows from the graph; a pipeline schedule that computes weights'
        gradients apart (torch's `stage_backward_weight`) keeps the weights' own order, but collects them in sets.
        Raises RuntimeError on all ranks.
        """
        order, self._order = self._order, None
        if order is None:
            return
        at = self._mesh.coordinates
        where = (at["pp"], at["tp"], self._mesh.data_rank if self._dealt is None else self._sharers.first)
        ranks: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for rank, (key, checksum) in enumerate(self._mesh.gather_objects((where, crc32(repr(order).encode())))):
            ranks.setdefault(key, []).append((rank, checksum))
        for first, *others in ranks.values():
            for rank, checksum in others:
                if checksum != first[1]:
                    raise RuntimeError(
                        f"batch: ranks {first[0]} and {rank} compute the gradients of weights in different orders, so that"
                        " their sums would be of different weights; use batch=fixed, or another parallel.schedule"
                    )

    def projection_square(self, whole_gradients: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
        """Compute Σ_j ⟨L_j, g⟩² / w_j over the whole global batch.

        whole_gradients: for every weight a call that gathers g, made once and in order; only one is in memory at a time.
        """
        products_K = torch.zeros(len(self._shares_K), dtype=torch.float64, device=self._mesh.device)
        for kept, gather in zip(self._kept, whole_gradients, strict=True):
            whole = gather()
            if self._sharers.count > 1:
                whole = self._sharers.piece_of(whole)
            for number, part in enumerate(kept):
                products_K[number] += torch.sum(part.to(whole.device, whole.dtype) * whole, dtype=torch.float64)
            kept.clear()
        self._mesh.sum(products_K, "pp")
        products_K = self._sum_over_sharers(products_K)  # a rank's part of a gradient has a part of the product
        return self._mesh.sum((products_K.square() / self._shares_K).sum() / self._sharers.count, "data")
