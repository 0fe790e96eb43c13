"""Choose from configs alone what each block keeps for backward, and whether it may fuse SwiGLU. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Protocol

from ..kernels import limits
from ..models.config import DecoderConfig
from ..models.costs import ForwardPass, block_bytes, recomputed_flops
from ..models.mixture.config import MixtureConfig
from ..models.part_config import FeedForwardConfig
from .config import ParallelConfig
from .pipeline.stages import splits_backward

POLICIES = ("none", "selective", "full", "offload")
MIXED = ("none", "selective", "full")
"""Policies that keep everything on the GPU: a budget mixes them, and a plan chooses one."""


@dataclass(frozen=True)
class ActivationSettings:
    """The config's settings for the activations that blocks keep, and what their size depends on.

    policy  `trainer.activation`, one of POLICIES
    budget  `trainer.activation_budget`: share of them that may be kept, where `policy` is "none"; None: all
    precision, compile  of the blocks
    """

    policy: str = "none"
    budget: float | None = None
    precision: str = "bf16"
    compile: bool = False


def mixed_policies(layers: int, budget: float, kept: Mapping[str, float], recomputed: Mapping[str, float]) -> list[str]:
    """Choose a policy for each block such that together they keep at most `budget` of what policy "none" keeps of all.

    kept, recomputed: what a block keeps, and what it recomputes, under each allowed policy, in any unit. The mix is the one
    with the least recomputation, found by trying all. The policies are spread evenly over the layers.
    Raises ValueError if nothing keeps to the budget.
    """
    limit = budget * layers * kept["none"] * (1 + 1e-9)
    mixes = [Counter(mix) for mix in combinations_with_replacement(kept, layers)]
    fitting = [mix for mix in mixes if sum(kept[policy] * count for policy, count in mix.items()) <= limit]
    if not fitting:
        least = min(kept, key=lambda policy: kept[policy])
        share = kept[least] / kept["none"]
        raise ValueError(f"blocks can't keep {budget:g} of what they would; policy '{least}' keeps {share:.3f} of it")
    best = min(fitting, key=lambda mix: sum(recomputed[policy] * count for policy, count in mix.items()))
    given: list[str] = []
    for at in range(1, layers + 1):
        so_far = Counter(given)
        given.append(max(best, key=lambda policy: best[policy] * at / layers - so_far[policy]))
    return given


def block_policies(model: DecoderConfig, parallel: ParallelConfig, settings: ActivationSettings) -> list[str]:
    """Choose the activation policy of every block: `trainer.activation`, or what `trainer.activation_budget` leaves to choose.

    Raises ValueError for a budget that no choice keeps to.
    """
    if settings.budget is None:
        return [settings.policy] * model.layers
    halves = splits_backward(parallel)
    block = model.block(0)
    # Blocks keep memory in proportion to their tokens, so any number of them will do.
    work = ForwardPass(1024, settings.precision, parallel.tp, parallel.sequence_parallel, settings.compile)
    if fused_experts_blocker(model, parallel, settings) is not None:
        work = replace(work, fused_experts=False)
    kept = {policy: block_bytes(block, work, policy) for policy in MIXED if not (halves and policy == "selective")}
    fused = bool(work.fused_experts)
    recomputed = {policy: recomputed_flops(block, policy, 0, fused_experts=fused, compiled=settings.compile) for policy in kept}
    return mixed_policies(model.layers, settings.budget, kept, recomputed)


class HasPrecision(Protocol):
    """Settings with a precision."""

    @property
    def precision(self) -> str:
        """Precision of the computation."""
        ...


class ComputeSettings(HasPrecision, Protocol):
    """The settings on which the choice of kernels depends: fields of `EngineSettings`, and of a plan's `Job`."""

    @property
    def float8(self) -> str:
        """`trainer.float8`."""
        ...

    @property
    def policies(self) -> Sequence[str]:
        """Activation policy of each block."""
        ...


def fused_swiglu_blocker(model: DecoderConfig, parallel: ParallelConfig, settings: ComputeSettings) -> str | None:
    """Return why no block may compute SwiGLU inside the products around it, on whatever GPU; None if some may.

    The kernels are `kernels/swiglu.py`.
    """
    reason = _fusion_blocker(parallel, settings)
    if reason is not None:
        return reason
    if settings.float8 != "none":
        return "trainer.float8 computes its products"
    dense = dense_feed_forwards(model)
    if not dense:
        return "experts' products are grouped"
    if not dense[0].is_plain_swiglu:
        return f"its kernels compute SwiGLU without biases, and the feed-forward is another ({model.ffn_activation})"
    if settings.policies and all(policy == "selective" for policy in settings.policies):
        return "trainer.activation=selective keeps one of them"
    widths = sorted({part.ffn_dim for part in dense})
    if not any(limits.fused_swiglu_takes(model.dim, width) for width in widths):
        return f"its kernels don't take widths of {model.dim} and {', '.join(map(str, widths))}"
    return None


def dense_feed_forwards(model: DecoderConfig) -> list[FeedForwardConfig]:
    """Return the feed-forwards that every token passes: those of dense layers, and mixtures' shared experts."""
    parts = [block.ffn.shared if isinstance(block.ffn, MixtureConfig) else block.ffn for block in model.blocks()]
    return [part for part in parts if part is not None]


def fused_experts_blocker(model: DecoderConfig, parallel: ParallelConfig, settings: HasPrecision) -> str | None:
    """Return why no mixture may use the kernels of `kernels/experts/fused.py`, on whatever GPU; None if some may."""
    reason = _fusion_blocker(parallel, settings)
    if reason is not None:
        return reason
    if parallel.ep > 1:
        return "parallel.ep sends tokens to experts elsewhere"
    mixtures = [block.ffn for block in model.blocks() if isinstance(block.ffn, MixtureConfig)]
    if not mixtures:
        return "there are no experts"
    mixture = mixtures[0]
    if not mixture.can_fuse:
        return "its kernels compute SwiGLU without biases, model.experts.capacity, a ReLU router or parts of your own"
    if not limits.fused_swiglu_takes(mixture.dim, mixture.expert.ffn_dim):
        return f"its kernels don't take widths of {mixture.dim} and {mixture.expert.ffn_dim}"
    return None


def _fusion_blocker(parallel: ParallelConfig, settings: HasPrecision) -> str | None:
    """Return what keeps a run from the kernels that compute a feed-forward as a whole."""
    if parallel.engine != "torch":
        return "DeepSpeed runs the blocks as they are"
    if parallel.tp > 1:
        return "parallel.tp cuts its products"
    if splits_backward(parallel):  # before 2.13 torch can't run the second half through an operator of several gradients
        return f"parallel.schedule={parallel.schedule} cuts its backward pass"
    return None if settings.precision == "bf16" else "its kernels are bf16's"
