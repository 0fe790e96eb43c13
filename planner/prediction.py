"""The prediction of a run: speed, utilisation, memory, days and cost. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..models.costs import flops_per_token
from .cluster import GIB, UNMEASURED, ClusterConfig
from .cost import KINDS, RankCost
from .step_time import HOST_WAIT, Step, StepTime, step_time

RESERVE = 2.0
"""GiB of a GPU that plans don't know of: CUDA, NCCL and compiled kernels."""
SHARE = 0.03
"""Part of a GPU that is left free besides: plans are within 2 % of what ranks hold (docs/parallelism.md), and fragments."""


def usable_bytes(memory: float) -> float:
    """Return the bytes that a plan may take of a GPU's."""
    return memory - RESERVE * GIB - SHARE * memory


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of a run on a cluster.

    step     what is predicted of
    samples  of the global batch
    tokens   of the whole run
    """

    step: Step
    samples: int
    tokens: float

    @property
    def cluster(self) -> ClusterConfig:
        """The machines."""
        return self.step.cluster

    @cached_property
    def time(self) -> StepTime:
        """Seconds of a step, by part."""
        return step_time(self.step)

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.time.seconds

    @property
    def gpus(self) -> int:
        """GPUs of the run."""
        return self.step.gpus

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and GPU."""
        return self.samples * self.step.job.seq_len / self.seconds / self.gpus

    @property
    def band(self) -> float:
        """Share by which the time may be off. Calibration times a bare block's launching, and a step's host has more to do."""
        return UNMEASURED if HOST_WAIT in self.time.parts else self.cluster.band

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: of the peak of the precision, attention counted in full at the length
        of a document where these are told apart, recomputation not counted."""
        seq_len = self.step.job.seq_len
        flops = flops_per_token(self.step.model, round(min(self.step.length or seq_len, seq_len)))
        return self.tokens_per_second * flops / self.cluster.peak(self.step.job.precision)

    @property
    def days(self) -> float:
        """Days of the whole run without a pause."""
        return self.tokens / (self.tokens_per_second * self.gpus) / 86400

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.days * 24 * self.gpus

    @property
    def cost(self) -> float | None:
        """Price of the whole run; None where the price of a GPU-hour is not known."""
        return None if self.cluster.price is None else self.gpu_hours * self.cluster.price

    @property
    def fullest(self) -> RankCost:
        """The rank that needs most memory."""
        return max(self.step.cost.ranks, key=lambda rank: rank.total)

    @property
    def bytes(self) -> int:
        """Peak bytes of that rank."""
        return self.fullest.total

    @property
    def host_bytes(self) -> int:
        """Bytes that a node's ranks offload to its host."""
        return self.step.away.host * min(self.gpus, self.cluster.gpus_per_node)

    @property
    def fits_gpus(self) -> bool:
        """True if the fullest GPU has the memory."""
        return self.bytes <= usable_bytes(self.cluster.memory * GIB)

    @property
    def fits(self) -> bool:
        """True if it fits into the GPUs, and the part that it offloads into their hosts."""
        return self.fits_gpus and self.host_bytes <= self.cluster.host_memory * GIB

    def as_dict(self) -> dict[str, Any]:
        """Return every figure as plain values."""
        rank = self.fullest
        return {
            "seconds_per_step": self.seconds,
            "tokens_per_second_per_gpu": self.tokens_per_second,
            "mfu": self.mfu,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "band": self.band,
            "fits": self.fits,
            "gib": {kind: (getattr(rank, kind) or 0) / GIB for kind in KINDS} | {"at_most": rank.total / GIB},
            "parts_seconds": dict(self.time.parts),
            "hidden_seconds": dict(self.time.beside),
        }
