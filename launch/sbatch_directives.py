"""Directives of an sbatch script: what a job asks of the cluster, from `launch`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.problems import Problem
from ..trainer.launching import LaunchConfig

CORES_PER_GPU = 8
"""For data loading, tokenizing and a writer of checkpoints beside each rank; nodes of 8 GPUs have 64 cores and more."""

KEYS = {
    "job-name": "launch.job_name",
    "nodes": "launch.nodes",
    "cpus-per-task": "launch.cpus_per_task",
    "mem": "launch.memory",
    "time": "launch.time",
    "partition": "launch.partition",
    "account": "launch.account",
    "output": "launch.log",
    "array": "launch.runs_at_once",
    "signal": "launch.signal_seconds",
}
"""Directive → the key that sets it."""

FIXED = ("ntasks", "ntasks-per-node", "open-mode")
"""Directives that the script relies on: srun starts one `meshloom train` on each node."""


def directives(launch: LaunchConfig, array: int = 0) -> list[str]:
    """Return the directives, each as it stands behind `#SBATCH`. array: number of jobs of the array; 0 for a single job."""
    own: dict[str, Any] = {
        "job-name": launch.job_name,
        "nodes": _nodes(launch),
        "no-kill": launch.most_nodes > launch.least_nodes or launch.spare_nodes > 0,
        "ntasks-per-node": 1,
        "gpus-per-node": launch.gpus_per_node,
        "cpus-per-task": _cores(launch),
        "mem": _memory(launch),
        "time": launch.time,
        "partition": launch.partition,
        "account": launch.account,
        "array": _array(launch, array),
        "output": ("%x-%A_%a.out" if array else "%x-%j.out") if launch.log == "auto" else launch.log,
        "open-mode": "append",
        "signal": f"B:USR1@{launch.signal_seconds}",
        "requeue": True,
    }
    asked = {_name(name): value for name, value in launch.sbatch.items()}
    return [_line(name, value) for name, value in {**own, **asked}.items() if value is not None and value is not False]


def directive_problems(launch: LaunchConfig) -> Iterator[Problem]:
    """Yield what sbatch would refuse or misread, and directives that the script can't do without."""
    for key in ("job_name", "partition", "account", "log"):
        name = getattr(launch, key)
        if name is not None and (not name.strip() or not name.isprintable()):
            yield Problem(f"launch.{key}", f"{name!r} is no name", "write one, in one line")
    if "/" in launch.job_name:
        fix = "leave the slash out: the job's output goes to <job_name>-<number>.out"
        yield Problem("launch.job_name", f"'{launch.job_name}' is no name of a file", fix)
    folder = Path(launch.log).parent
    if "%" not in str(folder) and not folder.is_dir():  # a job that can't open its log ends without a word
        yield Problem("launch.log", f"there is no folder '{folder}'", f"make it first: mkdir -p {shlex.quote(str(folder))}")
    for name, value in launch.sbatch.items():
        yield from _problems_of_directive(name, value)
    for number, line in enumerate(launch.setup):
        if not isinstance(line, str):
            yield Problem(f"launch.setup[{number}]", f"{line!r} is no line of shell", "quote it")


def _problems_of_directive(name: str, value: Any) -> Iterator[Problem]:
    key = f"launch.sbatch.{name}"
    if _name(name) in KEYS:
        yield Problem(key, "this directive has a key of its own", f"use {KEYS[_name(name)]}")
    elif _name(name) in FIXED:
        yield Problem(key, "the script starts one `meshloom train` on each node and appends to its log", "leave it out")
    elif not re.fullmatch(r"[a-z][a-z-]+", _name(name)):
        yield Problem(key, "is no long name of a directive", "write it without dashes in front: qos for --qos")
    elif isinstance(value, dict | list) or (isinstance(value, str) and (not value.strip() or not value.isprintable())):
        yield Problem(key, f"{value!r} is no value of a directive", "write it in one line; true for none, null to leave it out")


def _nodes(launch: LaunchConfig) -> str:
    """Return the nodes to ask for, spare ones included: those that no rank needs wait until one is lost."""
    least, most = launch.least_nodes + launch.spare_nodes, launch.most_nodes + launch.spare_nodes
    return str(most) if least == most else f"{least}-{most}"


def _name(name: str) -> str:
    return name.replace("_", "-")


def _line(name: str, value: Any) -> str:
    return f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}"


def _asks(launch: LaunchConfig, *names: str) -> bool:
    return any(_name(name) in names and value is not None for name, value in launch.sbatch.items())


def _cores(launch: LaunchConfig) -> int | None:
    """Return the cores of a node; None where another directive says it, or the cluster."""
    if launch.cpus_per_task != "auto":
        return launch.cpus_per_task
    return None if _asks(launch, "cpus-per-gpu") else CORES_PER_GPU * launch.gpus_per_node


def _memory(launch: LaunchConfig) -> str | None:
    """Return the memory of a node; None where another directive says it, or the cluster."""
    return None if _asks(launch, "mem-per-cpu", "mem-per-gpu") else launch.memory


def _array(launch: LaunchConfig, count: int) -> str | None:
    limit = f"%{launch.runs_at_once}" if launch.runs_at_once is not None else ""
    return f"0-{count - 1}{limit}" if count else None
