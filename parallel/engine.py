"""Engine: the protocol between the training step and whatever shards, computes and updates the weights.

The trainer never asks which engine it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch

from ..config.precision import PRECISIONS
from ..data.assignment import Share
from ..data.batch import MicroBatch
from ..kernels.attention_blocks import Kernel
from ..models.config import DecoderConfig
from ..models.mixture.balance_config import BalanceConfig
from ..optim.local.config import SYNCHRONOUS, LocalConfig
from ..optim.optimizers.parameters import NamedParameter, Shards
from .fragment import Fragment
from .gradient_noise import Measure, Moments
from .hybrid.hidden_copies import HiddenCopies
from .pipeline.stages import StagePlan

OptimizerFactory = Callable[[Sequence[NamedParameter], Shards], torch.optim.Optimizer]
"""Builds the run's optimizer over the parameters as a rank holds them."""


@dataclass(frozen=True)
class EngineSettings:
    """The settings of an engine apart from the layout: everything that engines read of the rest of the config.

    seed       of the initial weights
    precision  one of PRECISIONS
    policies   what each block of the whole model keeps for its backward pass (`policies.POLICIES`); (): all keep everything
    stages     layers of each pipeline stage, and who holds it; None: there is one stage
    compile    whether blocks are compiled
    float8     recipe for the blocks' matrix products (`float8.RECIPES`)
    seq_len    positions per sample, for the choice of attention's kernel; 0: it does without
    measures   whether steps may be asked for gradient statistics
    attention  kernel that attention computes with in half precision on a GPU, by the layers' windows (None: without one)
    balance    of the load of a mixture's experts
    local      how islands join what they have learned; default: there is one
    hidden_copies  how much of rows' activations goes to host memory beside the computation; None: nothing
    masters    how masters are kept where the computation is in bf16: one of `trainer.masters`
    """

    seed: int = 0
    precision: str = "bf16"
    policies: tuple[str, ...] = ()
    stages: StagePlan | None = None
    compile: bool = False
    float8: str = "none"
    seq_len: int = 0
    measures: bool = False
    masters: str = "full"
    hidden_copies: HiddenCopies | None = None
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    local: LocalConfig = SYNCHRONOUS
    attention: Mapping[int | None, Kernel] = field(default_factory=dict[int | None, Kernel])

    def kernel(self, shape: DecoderConfig | None, layer: int) -> Kernel:
        """Return the kernel of a layer's attention. shape: None for a model that is no decoder."""
        window = None if shape is None else shape.block(layer).attention.window
        return self.attention.get(window, "cudnn")

    def policy(self, layer: int) -> str:
        """Return the activation policy of a layer's block."""
        return self.policies[layer] if self.policies else "none"

    @property
    def compute(self) -> torch.dtype:
        """Dtype of the forward and backward pass."""
        return cast(torch.dtype, getattr(torch, PRECISIONS[self.precision].dtype))

    @property
    def storage(self) -> torch.dtype:
        """Dtype in which weights are updated and saved: at least fp32."""
        return torch.promote_types(self.compute, torch.float32)


@dataclass(frozen=True)
class StepLoss:
    """Loss of a global batch, the same on every rank, still on the device so that reading it is the caller's choice.

    total   sum of token losses; tokens: number of positions that carry loss; `mean` is rule R2's loss
    extras  sums over the global batch of what the model also reports (a load-balancing loss, for example)
    own     this rank's part of the total; None: not known, as of an evaluation
    """

    total: torch.Tensor
    tokens: torch.Tensor
    extras: dict[str, torch.Tensor]
    own: torch.Tensor | None = None

    @property
    def mean(self) -> torch.Tensor:
        """Token-weighted mean loss over the global batch; 0 for one in which no position carries loss."""
        return self.total / self.tokens.clamp(min=1)


class OuterSteps(Protocol):
    """Local updating: what an island does together with the others. The loop calls it after a step that counts."""

    def count(self, step: int, tokens: torch.Tensor, loss: torch.Tensor) -> None:
        """Note the tokens that the island has learned from in a step, and its mean loss of them.

        A step that is taken again replaces itself.
        """
        ...

    def due(self, step: int, *, last: bool) -> bool:
        """Return whether islands exchange something after this step: the same on all of them. last: of the run"""
        ...

    def exchange(self, step: int, *, stop: bool, last: bool) -> bool:
        """Send and receive what is due, and take the outer steps. Every rank of all islands calls it.

        The island's steps up to this one must be known to be good. stop: whether a stop was requested on the island. Returns
        whether one was requested on some island, as far as is known by now: the same on all of them.
        """
        ...

    def numbers(self) -> dict[str, float]:
        """Return numbers for the metrics: see docs/local_updating.md. Those of exchanges are what came since the last call."""
        ...


class Engine(Protocol):
    """Forward, backward, update and state of a model spread over a layout."""

    module: torch.nn.Module

    @property
    def islands(self) -> OuterSteps | None:
        """The outer steps under local updating; None: all processes take their steps together."""
        ...

    @property
    def masks_updates(self) -> bool:
        """True if `update` can be skipped on the device; otherwise the host waits there for `skip`."""
        ...

    def accumulate(self, share: Share, global_tokens: torch.Tensor, measure: Measure = Measure.NOTHING) -> StepLoss:
        """Run forward and backward of this rank's share; gradients of `total / global_tokens` are ready afterwards.

        share: of an assignment that every rank computes alike. What ranks must agree on without a message follows from the
        assignment: the dtype in which they exchange gradients (`share.passes`), the workers of the gradient statistics
        (`share.workers`), and where the batch's first half ends (`share.first_half`). Ranks run equally many micro-batches.
        global_tokens: valid positions of the whole global batch, a scalar on the device.
        measure: what `gradient_moments` will be asked for.
        """
        ...

    def gradient_norm(self) -> torch.Tensor:
        """Compute the Euclidean norm of the whole gradient, every parameter counted once; the same on every rank."""
        ...

    def clip(self, max_norm: float, norm: torch.Tensor) -> None:
        """Scale the gradient by min(1, max_norm / (norm + 1e-6))."""
        ...

    def gradient_moments(self, samples: int) -> Moments | None:
        """Return moments of the gradient just accumulated from a batch of so many samples, unclipped, on the device.

        Call it once, after `gradient_norm`, where `accumulate` was told to measure. None when they can't be estimated.
        """
        ...

    def update(self, lr: float, skip: torch.Tensor | None = None) -> None:
        """Take one optimizer step at this learning rate.

        skip: one fp32 number on the device, the same on every rank. Where it is 1, no weight and no state changes, neither
        the optimizer's nor that of the balance of experts.
        """
        ...

    def forget_updates(self, count: int) -> None:
        """Take the last `count` updates, all of which were skipped, out of the optimizer's counts."""
        ...

    def zero_grad(self) -> None:
        """Discard the gradient."""
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> StepLoss:
        """Compute the loss without gradients. `tokens` is counted over all ranks here."""
        ...

    def assignments(self) -> torch.Tensor | None:
        """Return each expert's assignments in the last `accumulate` or `evaluate`, over all ranks: (L, E), fp64, on the device.

        Rows are the layers with a mixture. None for a model without experts, and where nothing was routed.
        """
        ...

    def forget_assignments(self) -> None:
        """Discard what `assignments` returns: a step is passed over, in which nothing is routed."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's boxes of the weights and of the optimizer's state, live: writing into them restores."""
        ...

    def prepare_restore(self) -> None:
        """Create every fragment that a checkpoint may hold, before the first update has created the optimizer's state."""
        ...

    def counters(self) -> dict[str, float]:
        """Return the optimizer's scalar state by name (Adam's step), uniform over parameters."""
        ...

    def load_counters(self, counters: dict[str, float]) -> None:
        """Restore what `counters` returned; called after the fragments have been restored."""
        ...

    def finish(self) -> None:
        """Wait for pending communication. Every rank calls it last; not for a run that has failed."""
        ...
