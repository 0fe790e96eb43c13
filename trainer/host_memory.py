"""Compare the host memory that a run takes for its state with what this machine has."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.precision import PRECISIONS
from ..config.problems import ConfigError, Problem
from ..config.words import counted
from ..planner.cost import RankCost
from ..planner.host import available_memory, memory_limit
from ..planner.memory import optimizer_bytes
from ..planner.tables import gib
from .costs import assigner_of, costs_of, inventory_of, is_known_decoder, job_of, optimizer_of, planned_layout
from .launching import all_processes, run_processes, visible_gpus
from .schema import RunConfig
from .typed import replace_keys


@dataclass(frozen=True)
class HostBytes:
    """Bytes of host memory that all processes of this machine take.

    state    weights, their gradients and the optimizer's state, each held once: the least that a step takes
    planned  with gradients in other forms, activations and working memory, which are estimates
    """

    state: int
    planned: int


def compare_host_memory(config: RunConfig) -> tuple[list[Problem], str]:
    """Compare a run without other problems with this machine. Return problems, and a warning or "".

    Only a state above the machine's limit is a problem, which no waiting changes. What is free is so at the moment.
    """
    on_gpus, free = visible_gpus() > 0, available_memory()
    found = host_bytes(config, on_gpus=on_gpus)
    if found is not None and found.planned > free and not on_gpus and _pytorch_has_gpus():
        on_gpus, found = True, host_bytes(config, on_gpus=True)
    if found is None or found.planned <= free:
        return [], ""
    processes = counted(run_processes(config.launch), "process")
    limit = memory_limit()
    if found.state > limit:
        here = f"all memory and swap (of the machine, or its container) are {gib(limit)} GiB"
        taken = f"{gib(found.state)} GiB in {processes}, and {here}"
        return [_problem(taken, on_gpus)], ""
    what = "what is offloaded takes" if on_gpus else "no GPU is visible, and with activations this run is planned at"
    fix = "offload from fewer processes" if on_gpus else "lower batch.micro or data.seq_len, or set trainer.activation=full"
    return [], f"{what} {gib(found.planned)} GiB in {processes}, where {gib(free)} GiB are free now. It may be killed: {fix}"


def _problem(taken: str, on_gpus: bool) -> Problem:
    if on_gpus:
        fix = "offload from fewer processes of this machine, or to disk with parallel.engine=deepspeed parallel.offload=nvme"
        return Problem("parallel.offload", f"what is offloaded takes {taken}", fix)
    fix = "train on GPUs, or a smaller model; `meshloom plan` starts nothing and needs no memory"
    return Problem("model", f"no GPU is visible, and weights, gradients and optimizer state take {taken}", fix)


def _pytorch_has_gpus() -> bool:
    """Ask PyTorch, which knows GPUs that are no files in /dev (WSL 2, ROCm). It is imported only to avoid a wrong message."""
    import torch

    return torch.cuda.is_available()


def host_bytes(config: RunConfig, *, on_gpus: bool) -> HostBytes | None:
    """Count what the processes of this machine hold in host memory: all there is without a GPU, else what is offloaded.

    None where nothing is held there, or where it is not known without building the model or its optimizer.
    """
    local, offload = run_processes(config.launch), {config.parallel.offload, config.parallel.offload_weights}
    if not is_known_decoder(config.model) or optimizer_bytes(config.optim) is None:
        return None
    if offload == {"none"} if on_gpus else "nvme" in offload:  # what lies on a disk then is not counted
        return None
    if not on_gpus:  # offloading pins nothing then, and moves nothing
        config = replace_keys(config, {"parallel.offload": "none", "parallel.offload_weights": "none"})
    if not local or not config.batch.samples or not (config.model.vocabulary or config.data.known_vocabulary):
        return None
    processes = all_processes(config.launch)
    layout, islands = planned_layout(config, processes), config.islands_on(processes)
    model = inventory_of(config)
    try:
        job = job_of(config, model.shape, assigner_of(config, layout, islands), fused=False)
    except ConfigError:  # of an activation budget: the trial build tells of it
        return None
    cost, away, _ = costs_of(model, config.parallel, layout, job, optimizer_of(config))
    if on_gpus:
        return HostBytes(local * away.host, local * away.host)
    state = [_least(rank, job.precision) + away.host for rank in cost.ranks]
    planned = [rank.total + away.host for rank in cost.ranks]
    if config.launch.most_nodes > 1:  # which stages of a pipeline come here is decided where machines meet
        return HostBytes(local * min(state), local * min(planned))
    return HostBytes(local * sum(state) // len(state), local * sum(planned) // len(planned))


def _least(rank: RankCost, precision: str) -> int:
    gradients = min(rank.gradients, rank.elements * PRECISIONS[precision].accum_bytes)
    return rank.weights + gradients + (rank.optimizer or 0)
