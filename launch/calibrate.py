"""`meshloom calibrate`: measure this machine for plans. A minute or two on one GPU; the rates are kept under a name.

meshloom calibrate --as mine                             kernels, copies, blocks; then: meshloom plan recipe=… cluster=minex64
torchrun --nproc-per-node 8 -m meshloom.launch.cli calibrate --as mine     the network, too; on several nodes also between them
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config.problems import ConfigError, Problem
from ..config.progress_bar import progress
from ..planner.calibration import as_yaml, block_errors, calibrated
from ..planner.cluster import GIB, ClusterConfig, load_cluster, options, profile_folder, recipes
from ..trainer.launching import under_torchrun, visible_gpus
from .exit_codes import BAD_CONFIG

CARDS = {"PCIE", "NVL"}
"""Words of the names of cards. The recipes are of GPUs on boards, which have faster memory and links."""
ALIKE = 0.03
"""Share by which a GPU's memory may differ from the data sheet's: drivers keep more or less of it."""


def main(argv: Sequence[str]) -> int:
    """Measure this machine and write its cluster. Returns 0, or 2 for options that can't be."""
    parser = argparse.ArgumentParser("meshloom calibrate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--as", dest="name", metavar="NAME", help="name of the cluster (default: by the GPU)")
    told = "the cluster whose data sheet is meant (default: by the GPU's name); there are: "
    parser.add_argument("--base", metavar="CLUSTER", help=told + ", ".join(options()))
    parser.add_argument("--cpu", action="store_true", help="measure the processor with small sizes, to try the command")
    arguments = parser.parse_args(list(argv))
    try:
        if not arguments.cpu and not visible_gpus():
            raise ConfigError([Problem("--cpu", "there is no GPU here to measure", "add --cpu to measure the processor")])
        name = arguments.name
        if name is not None and not re.fullmatch(r"[A-Za-z][\w.-]*", name):
            raise ConfigError([Problem("--as", f"'{name}' can't be a name", "use letters, digits, dots and dashes")])
        if name in recipes():
            raise ConfigError([Problem("--as", f"{name} is a recipe of Meshloom", f"use for example my_{name}")])
        base = load_cluster([f"cluster={arguments.base}"]) if arguments.base else None
        return calibrate(name, base, cpu=arguments.cpu)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG


def calibrate(name: str | None, base: ClusterConfig | None, *, cpu: bool) -> int:
    """Measure, fit and write. Of several processes the first writes."""
    import torch

    from .calibrate_measure import LARGE, SMALL, Bench, join_group, machine, with_measured_peaks

    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu") if cpu else torch.device("cuda", local)
    if cpu:
        cluster = base or _processor()
    else:
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / GIB
        cluster = replace(base or data_sheet(properties.name, memory), gpu=properties.name, memory=round(memory, 1))
    if not cpu:
        torch.cuda.set_device(device)  # NCCL and kernels launch on the current one, which is the first on every rank otherwise
    bench = Bench(device, SMALL if cpu else LARGE, cluster)
    first = os.environ.get("RANK", "0") == "0"
    parts = list(bench.parts())
    if under_torchrun():
        parts += list(bench.collectives(join_group(device)))
    for number, (told, run) in enumerate(parts, 1):
        with progress(f"{number}/{len(parts)} {told}", quiet=not first, announce=True):
            run()
    if under_torchrun():
        torch.distributed.destroy_process_group()
    if not first:
        return 0
    if base is None and cpu:
        cluster = with_measured_peaks(cluster, bench.found)
    cluster = calibrated(_sized(cluster, 1 if cpu else visible_gpus()), bench.found)
    label = name or re.sub(r"\W+", "_", cluster.gpu.lower()).strip("_")
    file = profile_folder() / f"{label}.yaml"
    _write(file, as_yaml(cluster, [f"Measured on {datetime.date.today()} by meshloom calibrate.", *machine()]))
    _report(cluster, block_errors(cluster, bench.found), file, label)
    return 0


def _sized(cluster: ClusterConfig, visible: int) -> ClusterConfig:
    """Return the cluster with as many GPUs as torchrun started processes, else with those that are visible.

    A job that sees a part of its node says nothing of the node, so that without torchrun its size stays the data sheet's.
    """
    if under_torchrun():
        gpus = int(os.environ["WORLD_SIZE"])
        return replace(cluster, gpus=gpus, gpus_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", gpus)))
    return replace(cluster, gpus=max(1, visible), gpus_per_node=max(cluster.gpus_per_node, visible))


def data_sheet(gpu: str, memory: float) -> ClusterConfig:
    """Return the recipe that a GPU's name means by one of its words. memory: GiB of the GPU.

    Raises ConfigError where there is none, and for another make of a GPU: a card, or one with more or less memory.
    """
    words = set(re.split(r"[^A-Z0-9]+", gpu.upper()))
    found = next((load_cluster([f"cluster={name}"]) for name in recipes() if name.upper() in words), None)
    if found is None:
        message = f"no cluster has a {gpu}"
    elif words & CARDS:
        message = f"{gpu} is a card, and the recipe's data sheet is of an {found.gpu} on a board"
    elif abs(memory / found.memory - 1) > ALIKE:
        message = f"{gpu} has {memory:.1f} GiB, and the recipe's {found.gpu} has {found.memory:g}"
    else:
        return found
    fix = f"give the one whose data sheet is nearest as --base; there are: {', '.join(options())}"
    raise ConfigError([Problem("--base", message, fix)])


def _processor() -> ClusterConfig:
    """Return the cluster of this machine's processor, whose figures are measured afterwards."""
    cluster = load_cluster(["cluster=h100"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return replace(cluster, gpu="processor", memory=memory, host_memory=memory, link=5.0, price=None)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def _report(cluster: ClusterConfig, errors: Sequence[float], file: Path, label: str) -> None:
    rates = cluster.rates
    passes = f"{rates.attention:.0%} and {rates.attention_backward:.0%}"
    print(f"products reach {rates.products:.0%} of the peak, attention's passes {passes}, memory {rates.memory:.0%}")
    print(f"whole blocks run at {rates.speed:.2f} of their kernels' speed")
    for told, rate, measured in (
        ("links of a node", rates.link, cluster.link_calibrated),
        ("the network", rates.network, cluster.network_calibrated),
    ):
        print(
            f"{told}: {rate:.0%} of its figure, " + ("measured" if measured else "not measured, which torchrun's processes do")
        )
    if errors:
        print(f"blocks are predicted within {max(map(abs, errors)):.1%}")
    print(f"wrote {file}; use it as cluster={label}")
