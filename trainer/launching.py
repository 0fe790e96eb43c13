"""Config of `launch`: how many processes, where, and under which scheduler."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from ..config.keys import Side, key
from ..config.problems import Problem

CONTAINERS = ("pyxis", "apptainer")
"""Ways in which a SLURM job enters a container: srun's own options (enroot with pyxis), or a command on each node."""


@dataclass(frozen=True)
class ContainerConfig:
    """Container in which the processes of a SLURM job run. Without an image they run on the nodes themselves."""

    SIDE: ClassVar[Side] = Side.PLACEMENT

    image: str | None = key(None, "image to run in: a .sqsh file or name for pyxis, a .sif file or address for apptainer")
    runtime: str = key("pyxis", "what enters the container: pyxis (enroot), or apptainer")
    mounts: list[Any] = key([], "folders to mount, each as outside:inside, besides the folder that the job is submitted from")
    python: str = key("python3", "Python inside of the container, which has Meshloom installed")

    def problems(self, key: str) -> list[Problem]:
        """Return what is wrong with the values."""
        found: list[Problem] = []
        if self.runtime not in CONTAINERS:
            found.append(Problem(f"{key}.runtime", f"there is no '{self.runtime}'", f"use {' or '.join(CONTAINERS)}"))
        if self.image is None and self.mounts:
            found.append(Problem(f"{key}.mounts", "there is no container to mount them in", f"give the image as {key}.image=…"))
        for mount in self.mounts:
            if not isinstance(mount, str) or not re.fullmatch(r"[^:,\n]+(:[^:,\n]+){0,2}", mount):
                found.append(Problem(f"{key}.mounts", f"{mount!r} is no mount", "write outside:inside, without commas"))
        return found


AUTO_RESTARTS = 3


@dataclass(frozen=True)
class LaunchConfig:
    """Processes that `meshloom train` starts, and resources that `meshloom slurm` requests."""

    SIDE: ClassVar[Side] = Side.PLACEMENT

    nproc: Any = key("auto", "processes on this machine; auto: one per GPU, or one where there is none")
    nodes: Any = key(
        1,
        "machines of the run; 2:4 goes on with any number from 2 to 4, whatever is left of them (in a recipe file write it in"
        " quotes)",
    )
    address: str = key(
        "auto",
        "under which the other machines of a run reach this one: an address, or the name of a network interface, such as ib0;"
        " auto: that of the default route",
    )
    spare_nodes: int = key(0, "further machines of the SLURM job, which wait to take the place of one that is lost")
    join_seconds: float = key(
        30.0, "how long a run waits for further machines at its start, once it has the least number of launch.nodes"
    )
    placements: dict[int, Any] = key(
        {},
        "number of machines: list of overrides for a run that goes on with so many, such as {2: ['parallel.pp=1']}; of a number"
        " that is not listed, the layout is as typed where it is legal, and planned where it is not",
    )
    max_restarts: Any = key(
        "auto",
        "how often all processes are started again after one has failed, to go on from what is saved; auto: 3 times, and never"
        " for a run of one process. A machine that is lost costs none. A config error is not tried again, nor what failed"
        " without progress",
    )
    silence: Any = key(
        "auto",
        "seconds without any progress of a rank after which the run is ended, with its name and stack; auto: learned from the"
        " run's own times; null: the rank is named, and only parallel.timeout ends the run",
    )
    check: bool = key(
        True,
        "before a run of several processes, compare GPUs' speed, the folder's storage, and clocks and versions of all nodes;"
        " warn of what is wrong",
    )
    job_name: str = key("meshloom", "name of the SLURM job")
    partition: str | None = key(None, "partition of the SLURM job; null: the cluster's default")
    account: str | None = key(None, "account of the SLURM job; null: the cluster's default")
    time: str = key("24:00:00", "time limit of the SLURM job")
    gpus_per_node: int = key(8, "GPUs of each machine of the SLURM job")
    cpus_per_task: Any = key(
        "auto", "CPU cores of each node of the SLURM job, on which its launcher starts all ranks; auto: 8 for each GPU"
    )
    memory: str | None = key("0", "memory of each node of the SLURM job; 0: all of it; null: the cluster's default")
    log: str = key("auto", "file of the SLURM job's output; auto: <job name>-<job number>.out where it is submitted")
    sbatch: dict[str, Any] = key(
        {},
        "further directives of sbatch by their long names, such as qos: high; true: without a value; null: leave ours out",
    )
    setup: list[Any] = key([], "lines of shell to run before the job's processes start: modules, environment, NCCL's settings")
    srun_args: list[Any] = key([], "further arguments of srun, each a word")
    runs_at_once: int | None = key(None, "runs of a sweep that SLURM has going at a time (`meshloom slurm -m`); null: no limit")
    container: ContainerConfig = field(default_factory=ContainerConfig)
    signal_seconds: int = key(300, "how long before its time limit the SLURM job saves, stops and queues itself again")

    def problems(self, key: str = "launch") -> list[Problem]:
        """Return what is wrong with the values."""
        found: list[Problem] = []

        def refuse(name: str, message: str, fix: str) -> None:
            found.append(Problem(f"{key}.{name}", message, fix))

        if self.nproc != "auto" and (not _is_count(self.nproc) or self.nproc < 1):
            refuse("nproc", f"{self.nproc!r} is not a number of processes", "use auto, or 1 or more")
        if _node_range(self.nodes) is None:
            refuse("nodes", f"{self.nodes!r} is not a number of machines", "use 1 or more, or least:most, such as 2:4")
        if self.gpus_per_node < 1:
            refuse("gpus_per_node", f"{self.gpus_per_node} is not a number of them", "use 1 or more")
        if not self.address.strip():
            refuse("address", "is empty", "use auto, an address, or the name of a network interface")
        if self.spare_nodes < 0 or (self.spare_nodes and self.most_nodes == 1):
            refuse("spare_nodes", f"{self.spare_nodes} can't take the place of any", "use 0, or give launch.nodes")
        if not self.join_seconds >= 0:
            refuse("join_seconds", f"{self.join_seconds} is not a time", "use 0 or more")
        found += self._placement_problems(f"{key}.placements")
        if self.max_restarts != "auto" and (not _is_count(self.max_restarts) or self.max_restarts < 0):
            refuse("max_restarts", f"{self.max_restarts!r} is not a number of restarts", "use auto, or 0 for none")
        if self.silence not in ("auto", None) and not (_is_number(self.silence) and self.silence > 0):
            refuse("silence", f"{self.silence!r} is not a time", "use auto, null, or seconds")
        if self.signal_seconds < 1:
            refuse("signal_seconds", f"{self.signal_seconds} leaves no time to save", "use for example 300")
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            refuse("time", f"'{self.time}' is not a time limit", "write hours:minutes:seconds, or days-hours")
        cores = self.cpus_per_task
        if cores not in ("auto", None) and (not isinstance(cores, int) or isinstance(cores, bool) or cores < 1):
            refuse(
                "cpus_per_task", f"{cores!r} is not a number of cores", "use auto, 1 or more, or null for the cluster's default"
            )
        if self.runs_at_once is not None and self.runs_at_once < 1:
            refuse("runs_at_once", f"{self.runs_at_once} starts none", "use 1 or more, or null for no limit")
        if self.memory is not None and not re.fullmatch(r"\d+[KMGT]?", self.memory):
            refuse("memory", f"'{self.memory}' is no amount of memory", "write for example 900G, or 0 for all that a node has")
        return [*found, *self.container.problems(f"{key}.container")]

    def _placement_problems(self, key: str) -> list[Problem]:
        """Return what is wrong with the list of placements, except what its overrides say."""
        found: list[Problem] = []
        for number, words in self.placements.items():
            least, most = self.least_nodes, self.most_nodes
            if not least <= number <= most:
                fix = "list numbers that launch.nodes allows"
                found.append(Problem(f"{key}.{number}", f"launch.nodes={self.nodes} never has {number} machines", fix))
            elif not isinstance(words, list) or not all(
                isinstance(word, str) and "=" in word for word in cast(list[Any], words)
            ):
                found.append(Problem(f"{key}.{number}", f"{words!r} is no list of overrides", "write ['key=value', …]"))
        return found

    @property
    def least_nodes(self) -> int:
        """The smallest number of machines that the run goes on with."""
        return (_node_range(self.nodes) or (1, 1))[0]

    @property
    def most_nodes(self) -> int:
        """The largest number of machines that the run has."""
        return (_node_range(self.nodes) or (1, 1))[1]


def _node_range(written: object) -> tuple[int, int] | None:
    """Read launch.nodes as least and most; None if it is neither a number nor a range."""
    if _is_count(written):
        count = cast(int, written)
        return (count, count) if count > 0 else None
    found = re.fullmatch(r"(\d+)(?::(\d+))?", written) if isinstance(written, str) else None
    if found is None:
        return None
    least, most = int(found[1]), int(found[2] or found[1])
    return (least, most) if 1 <= least <= most else None


def restarts(launch: LaunchConfig, processes: int) -> int:
    """Return how often a run of so many processes is started again."""
    if launch.max_restarts != "auto":
        return int(launch.max_restarts)
    return AUTO_RESTARTS if processes > 1 else 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def under_torchrun() -> bool:
    """Return whether torchrun, or a scheduler that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def visible_gpus() -> int:
    """Return the number of GPUs visible to this process, as far as that can be told without PyTorch."""
    there = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if visible is None else min(there, len(visible_devices(visible, there)))


def visible_devices(visible: str, there: int) -> list[str]:
    """Return the entries of CUDA_VISIBLE_DEVICES that CUDA obeys: those before the first that names none of so many GPUs.

    -1 hides all, and so does what schedulers write for a job without a GPU (NoDevFiles).
    """

    def is_valid(word: str) -> bool:
        return word.startswith(("GPU-", "MIG-")) or (word.isdecimal() and int(word) < there)

    return list(itertools.takewhile(is_valid, (word.strip() for word in visible.split(","))))


def gpu_count() -> int:
    """Return the number of GPUs that PyTorch can use in this process."""
    if not visible_gpus():
        return 0
    import torch

    return torch.cuda.device_count()


def planned_processes(launch: LaunchConfig) -> int:
    """Return the number of processes of a run on launch.nodes machines, perhaps others than this; 0 if not known."""
    per_node = launch.gpus_per_node if launch.nproc == "auto" and launch.most_nodes > 1 else run_processes(launch)
    return per_node * launch.most_nodes


def full_processes(launch: LaunchConfig, processes: int) -> int:
    """Return how many processes the run has with all machines of launch.nodes, of which so many are started now.

    0: not known, as where a scheduler sets the variables of torchrun but the number of machines. All processes of a run have to
    say the same, so machines are taken to be alike. A launcher that asks about fewer machines gives launch.nproc as a number.
    """
    if under_torchrun():
        machines = int(os.environ.get("GROUP_WORLD_SIZE", "0"))
    else:
        per_node = launch.nproc if _is_count(launch.nproc) and launch.nproc > 0 else 0
        whole = bool(per_node) and processes % per_node == 0
        machines = min(processes // per_node, launch.most_nodes) if whole else launch.most_nodes
    known = machines > 0 and launch.most_nodes > 1 and processes % machines == 0
    return processes // machines * launch.most_nodes if known else 0


def all_processes(launch: LaunchConfig) -> int:
    """Return the number of processes of a run whose machines are like this one; 0 if `launch.nproc` is not a number."""
    return run_processes(launch) if under_torchrun() else run_processes(launch) * launch.most_nodes


def run_processes(launch: LaunchConfig) -> int:
    """Return the number of processes of a run: torchrun's world size, or without torchrun that of `launch.nproc`.

    0 if `launch.nproc` is not a number.
    """
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    if launch.nproc == "auto":
        return max(1, visible_gpus())
    return launch.nproc if _is_count(launch.nproc) else 0
