"""Second moments of a step's gradient, measured in the backward pass. The batch-size controllers decide from them.

The workers are the micro-batches of the whole global batch, on whichever rank they run, so the numbers depend on
batch.micro alone and not on the layout. Blank micro-batches are no workers. A hook on every unsharded weight sees the
gradient of one micro-batch before anything is added to it or reduced: that is DDP-Norm's and FSDP-Norm's quantity (arXiv
2412.21124) for every ZeRO stage, one kernel per weight and micro-batch, and one number per rank in the collective that the
gradient's norm needs anyway.

Context-parallel ranks each have a part of a worker's gradient. They sum it weight by weight in the hooks (`worker_sums.py`), as
the square of a sum does not follow from the squares of its parts. A product with the whole gradient does.

Not seen: a tied embedding cut by a pipeline, whose two parts add up on neither rank. `limits.measuring_problems` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from ..data.assignment import Share
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
        self._sharers = WorkerRanks() if mesh.size("cp") == 1 else WorkerRanks(mesh.group("cp"), 0, mesh.size("cp"))
        self._arriving: tuple[int, Callable[[], torch.Tensor]] | None = None  # (index of the weight, its piece of a sum)

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
            accum_dtype = torch.float64 if mine.dtype == torch.float64 else torch.float32
            if self._sharers.count == 1:
                self._norms[index].append(torch.linalg.vector_norm(mine, dtype=accum_dtype))
            else:  # the last weight's sum arrived while this gradient was computed, unless a rank is slow
                with self._mesh.compute_time.waiting():
                    self._finish_sum()
                self._arriving = index, self._sharers.start_sum(mine, accum_dtype)
            if self.measure is Measure.PROJECTIONS:
                self._kept[index].append(mine.to("cpu", accum_dtype, copy=True))

        return hook

    def _finish_sum(self) -> None:
        """Wait for the sum under way, and take the norm of this rank's piece."""
        if self._arriving is not None:
            index, piece = self._arriving
            self._norms[index].append(torch.linalg.vector_norm(piece()))
            self._arriving = None

    def begin(self, share: Share, global_tokens: torch.Tensor) -> None:
        """Clear the last step, and record each micro-batch's share of the tokens, in the order of their backward passes."""
        self._sums = self._arriving = None
        if self.measure is Measure.NOTHING:
            return
        self._norms: list[list[torch.Tensor]] = [[] for _ in self._index]
        self._kept: list[list[torch.Tensor]] = [[] for _ in self._index]
        # From pinned memory: any other copy to a GPU waits until it has done all that was queued before.
        tokens = [batch.valid_tokens for batch in share.micro_batches]
        counted = torch.tensor(tokens, dtype=torch.float64, pin_memory=self._mesh.device.type == "cuda")
        shares = counted.to(self._mesh.device, non_blocking=True) / global_tokens
        # A micro-batch without a target (a blank one) has no gradient: its square of 0 is divided by anything but 0.
        self._shares_K = torch.where(shares > 0, shares, 1.0)
        self._workers = share.workers

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
        unseen = "a weight's gradient went unseen; was the engine built with `measures`?"
        assert all(len(norms) == len(self._shares_K) for norms in self._norms), unseen
        stacked = torch.stack([norm for norms in self._norms for norm in norms])  # one stack per weight would be a kernel each
        norms_PK = stacked.view(len(self._norms), -1).double() / self._scale
        return (norms_PK.square() * self._per_copy.unsqueeze(1) / self._shares_K).sum()

    def projection_square(self, whole_gradients: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
        """Compute Σ_j ⟨L_j, g⟩² / w_j over the whole global batch.

        whole_gradients: for every weight a call that gathers g, made once and in order; only one is in memory at a time.
        """
        products_K = torch.zeros(len(self._shares_K), dtype=torch.float64, device=self._mesh.device)
        for kept, gather in zip(self._kept, whole_gradients, strict=True):
            whole = gather()
            for number, part in enumerate(kept):
                products_K[number] += torch.sum(part.to(whole.device, whole.dtype) * whole, dtype=torch.float64)
            kept.clear()
        self._mesh.sum(products_K, "pp")
        self._mesh.sum(products_K, "cp")  # a rank's part of a gradient has a part of the product
        return self._mesh.sum((products_K.square() / self._shares_K).sum() / self._sharers.count, "data")
