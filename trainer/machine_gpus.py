"""Ask which GPUs this machine has, as a cluster that a run can be fitted to. Imports no torch."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace

from ..config.problems import ConfigError, Problem
from ..planner.cluster import ClusterConfig, load_cluster, recipes
from .fitting import UnknownMachineError
from .launching import run_processes, visible_devices, visible_gpus
from .schema import RunConfig

QUERY = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,mig.mode.current", "--format=csv,noheader,nounits"]
SECONDS = 60
"""Time in which nvidia-smi answers; without persistence mode it first wakes every GPU."""
OWN = 0.004
"""Share of a GPU's memory that its driver keeps: programs see so much less than nvidia-smi tells."""
USUAL = "h100"
"""The cluster whose rates stand for those of a GPU without a recipe, and for a plan's GPUs where none is named."""


def machine_here(config: RunConfig) -> ClusterConfig | None:
    """Return this machine's GPUs as a cluster of the run's processes; None if the run is on processors.

    Raises UnknownMachineError where the GPUs can't be asked, and ConfigError where they are split by MIG.
    """
    if not visible_gpus():
        return None
    name, memory, split = smallest_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if split:
        told = "auto is fitted to whole GPUs, and those of this run are split by MIG"
        raise ConfigError([Problem(key, told, f"give {key} a value of its own") for key in config.left_to_plan])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", run_processes(config.launch)))
    return replace(cluster_of(name, memory), gpus_per_node=max(1, local))


def planned_machine(config: RunConfig) -> ClusterConfig:
    """Return the GPUs that a plan without a cluster is made for: this machine's, or else an H100's."""
    return machine_here(config) or load_cluster([f"cluster={USUAL}"])


def cluster_of(name: str, memory: float) -> ClusterConfig:
    """Return the recipe's cluster of a GPU, or the usual rates under its name. memory: GiB of it."""
    known = next((recipe for recipe in recipes() if recipe.upper() in name.upper().replace(" ", "")), USUAL)
    return replace(load_cluster([f"cluster={known}"]), gpu=name, memory=memory)


@functools.cache
def smallest_gpu(visible: str | None) -> tuple[str, float, bool]:
    """Return name and GiB of the smallest GPU among those that CUDA_VISIBLE_DEVICES lets a run see, and whether MIG splits any.

    Raises UnknownMachineError if nvidia-smi does not tell.
    """
    if (visible or "").strip().startswith("MIG"):
        return "MIG", 0.0, True
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=SECONDS, check=True)
        rows = [[word.strip() for word in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
        named = None if visible is None else visible_devices(visible, len(rows))
        shown = [(name, mib, mig) for index, uuid, name, mib, *mig in rows if _is_visible(index, uuid, named)]
        if any("Enabled" in mig for *_, mig in shown):
            return "MIG", 0.0, True
        name, mib = min(((name, float(mib)) for name, mib, _ in shown), key=lambda each: each[1])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UnknownMachineError(
            f"nvidia-smi does not tell the memory of the GPUs ({error or type(error).__name__})"
        ) from error
    return name, mib / 1024 * (1 - OWN), False


def _is_visible(index: str, uuid: str, named: Sequence[str] | None) -> bool:
    return named is None or any(name == index or uuid.startswith(name) for name in named)
