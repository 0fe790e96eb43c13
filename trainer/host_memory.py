"""Compare the host memory that a run takes for its state with what this machine has left. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.precision import PRECISIONS
from ..config.problems import ConfigError, Problem
from ..config.words import counted
from ..planner.cost import RankCost
from ..planner.host import available_memory
from ..planner.memory import optimizer_bytes
from ..planner.tables import gib
from .costs import assigner_of, costs_of, inventory_of, is_known_decoder, job_of, optimizer_of, planned_layout
from .launching import all_processes, run_processes, visible_gpus
from .schema import RunConfig


@dataclass(frozen=True)
class HostBytes:
    """Bytes of host memory that all processes of this machine take.

    state    weights, their gradients and the optimizer's state, each held once: the least that a step takes
    planned  with gradients in other forms, activations and working memory, which are estimates
    """

    state: int
    planned: int


def host_memory_problems(config: RunConfig) -> list[Problem]:
    """Return a problem if the state of a run without other problems needs more host memory than this machine has left."""
    found, free = host_bytes(config), available_memory()
    if found is None or found.state <= free:
        return []
    if visible_gpus():
        fix = "offload from fewer processes of this machine, or to disk with parallel.engine=deepspeed parallel.offload=nvme"
        return [Problem("parallel.offload", f"what is offloaded takes {_compared(config, found.state, free)}", fix)]
    told = f"no GPU is visible, and weights, gradients and optimizer state take {_compared(config, found.state, free)}"
    return [Problem("model", told, "train on GPUs, or a smaller model; `meshloom plan` starts nothing and needs no memory")]


def host_memory_warning(config: RunConfig) -> str:
    """Return a warning if a run's state fits into host memory, but not what is estimated besides; "" otherwise."""
    found, free = host_bytes(config), available_memory()
    if found is None or not found.state <= free < found.planned:
        return ""
    told = f"no GPU is visible, and with activations this run is planned at {_compared(config, found.planned, free)}"
    return f"{told}. It may be killed: lower batch.micro or data.seq_len, or set trainer.activation=full"


def _compared(config: RunConfig, needed: int, free: int) -> str:
    processes = counted(run_processes(config.launch), "process")
    return (
        f"{gib(needed)} GiB in {processes}, where {gib(free)} GiB are available (the machine's, or what its container leaves)"
    )


def host_bytes(config: RunConfig) -> HostBytes | None:
    """Count what the processes of this machine hold in host memory: all there is without a GPU, else what is offloaded.

    None where the costs of the model or its optimizer are not known without building them.
    """
    local, gpus = run_processes(config.launch), visible_gpus()
    if (
        not is_known_decoder(config.model)
        or optimizer_bytes(config.optim) is None
        or (gpus and config.parallel.offload == "none")
    ):
        return None
    if not local or not config.batch.samples or not (config.model.vocabulary or config.data.known_vocabulary):
        return None
    layout = planned_layout(config, all_processes(config.launch))
    model = inventory_of(config)
    try:
        job = job_of(config, model.shape, assigner_of(config, layout), fused=False)
    except ConfigError:  # of an activation budget: the trial build tells of it
        return None
    cost, away, _ = costs_of(model, config.parallel, layout, job, optimizer_of(config))
    if gpus:
        return HostBytes(local * away.host, local * away.host)
    state = [_least(rank, job.precision) + away.host for rank in cost.ranks]
    planned = [rank.total + away.host for rank in cost.ranks]
    if config.launch.most_nodes > 1:  # which stages of a pipeline come here is decided where machines meet
        return HostBytes(local * min(state), local * min(planned))
    return HostBytes(local * sum(state) // len(state), local * sum(planned) // len(planned))


def _least(rank: RankCost, precision: str) -> int:
    gradients = min(rank.gradients, rank.elements * PRECISIONS[precision].accum_bytes)
    return rank.weights + gradients + (rank.optimizer or 0)
