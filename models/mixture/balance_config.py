"""Config of `balance`: what keeps the load of a mixture's experts even. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...config.keys import Side, key
from ...config.problems import Problem
from .config import ExpertsConfig

COUNTS = ("past", "exact", "prefix")
COEFFICIENTS = ("global_batch", "micro_batch", "sequence", "z_loss", "bias_rate", "locality", "chunk_sparsity")
SPARSITY = ("locality", "chunk_sparsity")
"""Coefficients of objectives for ReLU routers."""
LONG_KEEP = 0.8
"""Averages of counts longer than this turned negative in the first steps of measurements."""


@dataclass(frozen=True)
class BalanceConfig:
    """Prices on the use of experts. All that are above 0 are added; each layer's counts by itself.

    A load-balancing loss is E · Σ_i f_i · P_i: f_i is the share of the assignments that expert i took, P_i the mean of its
    probability. It is 1 for an even load. What the losses differ in is the tokens that f is the share of.
    """

    SIDE: ClassVar[Side] = Side.RECIPE

    global_batch: float | None = key(
        None, "coefficient of the load-balancing loss over the global batch (arXiv 2501.11873); null: 0.008 with experts"
    )
    counts: str = key(
        "past",
        "shares in that loss: past (of earlier steps), exact (of this step, counted by an extra forward pass) or prefix (of"
        " the micro-batches so far; depends on how a batch is cut)",
    )
    keep: float = key(0.5, "past: weight of earlier shares in the average of steps; 0: the last step alone")
    micro_batch: float = key(0.0, "coefficient of the load-balancing loss of each micro-batch; batch.micro then is recipe")
    sequence: float = key(0.0, "coefficient of the load-balancing loss of each sequence (DeepSeek-V3, arXiv 2412.19437)")
    z_loss: float = key(0.0, "coefficient of the square of the router logits' log-sum-exp (ST-MoE, arXiv 2202.08906)")
    bias_rate: float = key(
        0.0, "loss-free balance (arXiv 2408.15664): a step moves the bias of each expert's choice by this; needs experts.bias"
    )

    locality: float = key(
        0.0, "coefficient of the objective that a token activates the experts of the one before it (BlockFFN, arXiv 2507.08771)"
    )
    steepness: float = key(100.0, "factor on the logits in that objective's sigmoids")
    chunk_sparsity: float = key(0.0, "coefficient, at first, of the experts that a chunk of tokens activates (BlockFFN)")
    chunk_length: int = key(8, "tokens of a chunk")
    chunk_steady: int = key(1000, "steps that leave the coefficient of chunk_sparsity as it is")
    chunk_adjust: int = key(
        100,
        "each so many steps after them the coefficient is multiplied by what the objective has changed by, by 1.025 at least if"
        " it has grown; 0: never",
    )

    @property
    def global_coefficient(self) -> float:
        """The coefficient of the loss over the global batch, with a mixture."""
        return 0.008 if self.global_batch is None else self.global_batch

    @property
    def depends_on_micro_batches(self) -> bool:
        """True if what is computed depends on how the global batch is cut into micro-batches."""
        return bool({"micro_batch", "counts"} & {*self.counted_in_parts})

    @property
    def counted_in_parts(self) -> list[str]:
        """The keys that ask for experts' shares within a sample or a micro-batch, or among the micro-batches so far."""
        asked = {
            "sequence": self.sequence > 0,
            "micro_batch": self.micro_batch > 0,
            "counts": self.counts == "prefix" and self.global_coefficient > 0,
        }
        return [name for name, is_asked in asked.items() if is_asked]

    def problems(self, key: str = "balance") -> list[Problem]:
        """Return what is wrong with the values."""
        found: list[Problem] = []
        if self.counts not in COUNTS:
            found.append(Problem(f"{key}.counts", f"there is no '{self.counts}'", f"use {', '.join(COUNTS)}"))
        if not 0 <= self.keep < 1:
            found.append(Problem(f"{key}.keep", f"{self.keep} is no weight of the past", "use a number in [0, 1)"))
        for name in COEFFICIENTS:
            number = getattr(self, name)
            if number is not None and not 0 <= number < math.inf:
                found.append(Problem(f"{key}.{name}", f"{number} can't be", "use 0 for none, or a number above"))
        if not 0 < self.steepness < math.inf:
            found.append(Problem(f"{key}.steepness", f"{self.steepness} can't be", "use a number above 0, such as 100"))
        for name, least in (("chunk_length", 1), ("chunk_steady", 0), ("chunk_adjust", 0)):
            if getattr(self, name) < least:
                found.append(Problem(f"{key}.{name}", f"{getattr(self, name)} can't be", f"use {least} or more"))
        return found

    def model_problems(self, experts: ExpertsConfig | None, key: str = "balance") -> list[Problem]:
        """Return what does not fit the model's experts. experts: None for a model without a mixture."""
        given = [name for name in COEFFICIENTS if getattr(self, name)]
        if experts is None:
            fix = "use 0 or null, or give model.experts.count"
            return [Problem(f"{key}.{name}", "the model has no mixture of experts to balance", fix) for name in given]
        found: list[Problem] = []
        if self.bias_rate and not experts.bias:
            text = "the choice of experts has no bias to move"
            found.append(Problem(f"{key}.bias_rate", text, "use model.experts.bias=true with scores=sigmoid, or 0"))
        if experts.router != "relu" and experts.parts.router is None:
            text = "a token of this router activates a fixed number of experts"
            found += [
                Problem(f"{key}.{name}", text, "use model.experts.router=relu, or 0") for name in given if name in SPARSITY
            ]
        if experts.router == "relu" and self.z_loss:
            found.append(Problem(f"{key}.z_loss", "a ReLU router has no softmax whose logits it could keep small", "use 0"))
        return found
