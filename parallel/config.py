"""Config of `parallel`: how the run is spread over processes."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import ClassVar, get_args

from ..config.keys import Side, key
from ..config.problems import Problem
from .context.blocks import RingExchange
from .context.ring_plan import DIRECT
from .deepspeed.settings import DeepSpeedConfig

ENGINES = ("torch", "deepspeed")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb", "zbv", "dualpipev")
CONTEXT_KINDS = ("ring", "ulysses")
RING_EXCHANGES: tuple[RingExchange, ...] = get_args(RingExchange)
GRADIENT_EXCHANGES = ("auto", "direct", "hierarchical")
HYBRID_KINDS = ("none", "greedy")
YEAR = 365 * 24 * 3600  # clocks of collectives overflow far beyond it


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes. Data parallelism takes what the others leave."""

    SIDE: ClassVar[Side] = Side.PLACEMENT

    engine: str = key("torch", "torch (FSDP2, DTensor, pipelining) or deepspeed")
    zero: int = key(3, "0 replicas; 1 shards optimizer state; 2 also gradients; 3 also weights")
    replicate: int = key(1, "hybrid sharding: number of groups that each hold a whole sharded copy (HSDP)")
    tp: int = key(1, "tensor-parallel size")
    sequence_parallel: bool = key(True, "with tp > 1: shard activations along the sequence between tensor-parallel regions")
    pp: int = key(1, "ranks that hold a pipeline's stages")
    ep: int = key(1, "expert-parallel size: ranks of a stage that each hold other experts of every mixture")
    schedule: str = key("1f1b", "pipeline schedule: gpipe, 1f1b, interleaved, zb, zbv or dualpipev")
    stages_per_rank: int | None = key(None, "pipeline stages of each rank; null: what the schedule needs")
    stage_layers: list[int] | None = key(None, "layers of each stage, written by hand; null: balanced by cost")
    cp: int = key(1, "context-parallel size")
    cp_kind: str = key("ring", "ring (zig-zag ring attention) or ulysses (all-to-all over heads)")
    ring_direct: int = key(
        DIRECT,
        "members of a ring (cp, or a document's under hdp) that each send keys to those who see them; in wider rings neighbours"
        " hand them on",
    )
    ring_exchange: str = key(
        "keys",
        "what members of a ring send to one another: keys (with values), or queries, whose outputs come back: fewer bytes"
        " where there are as many heads of both",
    )
    hdp: str = key(
        "none",
        "hybrid data parallelism: none deals samples to ranks; greedy their documents, by cost, and long ones to several ranks",
    )
    hdp_costs: str | None = key(
        None,
        "with hdp: the cluster by whose rates documents cost, as `meshloom calibrate --as` names it, the same on all nodes;"
        " null: counts of FLOPs tell",
    )
    hdp_offload: bool = key(
        False,
        "with hdp_costs: rows keep activations in host memory, as many as the cluster's rates let be copied during computation",
    )
    hdp_tokens: int | None = key(None, "with hdp: tokens of a rank's micro-batch at most; null: batch.micro times data.seq_len")
    copy_engines: bool = key(
        True, "GPUs of one host send weights and gradients that only move by their copy engines, where NCCL can (torch engine)"
    )
    gradient_exchange: str = key(
        "auto",
        "how ZeRO-1's gradients reach the ranks that update them, and Muon's and others' matrices their owners (torch engine):"
        " direct (one all-to-all), hierarchical (within hosts, and between them; gradients are summed first), or auto: by hosts"
        " and ranks",
    )
    timeout: float = key(600.0, "seconds before a collective that waits for a lost rank gives up")
    offload: str = key(
        "none",
        "where the optimizer's state lives between updates: none (with the weights), cpu, nvme (DeepSpeed only); the torch"
        " engine takes the sharded weights along",
    )
    offload_weights: str = key("none", "where DeepSpeed's ZeRO-3 keeps the weights' shards between uses: none, cpu or nvme")
    offload_path: str | None = key(None, "folder for nvme: a fast local disk")
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    @property
    def exchanges_rows(self) -> bool:
        """True if ranks send each other rows of gradients, and sum them themselves (`torch/exchange.py`)."""
        return self.engine == "torch" and self.zero == 1 and self.pp == 1 and self.offload == "none"

    def problems_of(self, *names: str) -> list[Problem]:
        """Return what is wrong with the values of these keys alone."""
        wanted = {f"parallel.{name}" for name in names}
        return [problem for problem in self.problems() if problem.key in wanted]

    def problems(self, key: str = "parallel") -> list[Problem]:
        """Return what is wrong with the values; what does not fit the work or the processes, `layout.py` and others say."""
        found: list[Problem] = []
        for name in ("replicate", "tp", "pp", "cp", "ep"):
            size = getattr(self, name)
            if size < 1:
                found.append(Problem(f"{key}.{name}", f"{size} is not a size", f"use {key}.{name}=1 to switch it off"))
        if self.zero not in (0, 1, 2, 3):
            found.append(Problem(f"{key}.zero", f"stage {self.zero} does not exist", "use 0, 1, 2 or 3"))
        if self.engine not in ENGINES:
            found.append(Problem(f"{key}.engine", f"there is no '{self.engine}'", f"use {' or '.join(ENGINES)}"))
        if self.schedule not in SCHEDULES:
            near = difflib.get_close_matches(self.schedule, SCHEDULES, 1)
            fix = f"did you mean {near[0]}?" if near else f"use {', '.join(SCHEDULES)}"
            found.append(Problem(f"{key}.schedule", f"there is no '{self.schedule}'", fix))
        if self.cp_kind not in CONTEXT_KINDS:
            fix = f"use {' or '.join(CONTEXT_KINDS)}"
            found.append(Problem(f"{key}.cp_kind", f"there is no '{self.cp_kind}'", fix))
        if self.ring_direct < 1:
            fix = f"use 1, or {DIRECT} for the GPUs of a host"
            found.append(Problem(f"{key}.ring_direct", f"{self.ring_direct} is no number of members", fix))
        if self.ring_exchange not in RING_EXCHANGES:
            fix = f"use {' or '.join(RING_EXCHANGES)}"
            found.append(Problem(f"{key}.ring_exchange", f"there is no '{self.ring_exchange}'", fix))
        if self.hdp not in HYBRID_KINDS:
            found.append(Problem(f"{key}.hdp", f"there is no '{self.hdp}'", f"use {' or '.join(HYBRID_KINDS)}"))
        elif self.hdp == "none" and self.hdp_tokens is not None:
            fix = f"leave it null, or use {key}.hdp=greedy"
            found.append(Problem(f"{key}.hdp_tokens", "only hybrid data parallelism reads it", fix))
        if self.hdp == "none" and self.hdp_costs is not None:
            fix = f"leave it null, or use {key}.hdp=greedy"
            found.append(Problem(f"{key}.hdp_costs", "only hybrid data parallelism reads it", fix))
        if self.hdp_offload and self.hdp_costs is None:
            fix = f"leave it false, or name a cluster by {key}.hdp_costs"
            found.append(Problem(f"{key}.hdp_offload", "how much can be copied unnoticed follows from measured rates", fix))
        if self.hdp_tokens is not None and self.hdp_tokens < max(1, self.tp):
            message = f"{self.hdp_tokens} tokens are no micro-batch for {key}.tp={self.tp}"
            found.append(Problem(f"{key}.hdp_tokens", message, "use thousands, or null"))
        if self.gradient_exchange not in GRADIENT_EXCHANGES:
            fix = f"use {', '.join(GRADIENT_EXCHANGES)}"
            found.append(Problem(f"{key}.gradient_exchange", f"there is no '{self.gradient_exchange}'", fix))
        for name in ("stages_per_rank", "stage_layers"):
            if self.pp == 1 and getattr(self, name) is not None:
                fix = f"leave it null, or set {key}.pp"
                found.append(Problem(f"{key}.{name}", f"there are no stages with {key}.pp=1", fix))
        if not 0 < self.timeout <= YEAR:
            found.append(
                Problem(f"{key}.timeout", f"{self.timeout} is not a time", "use seconds, a year at most, for example 600")
            )
        if self.offload_path is not None and "nvme" not in (self.offload, self.offload_weights):
            fix = f"leave it null, or use {key}.offload=nvme"
            found.append(Problem(f"{key}.offload_path", "nothing is offloaded to nvme, so nobody would look there", fix))
        return found
