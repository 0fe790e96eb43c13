"""`meshloom check`: are all devices, links, folders and nodes of a run as fast as their kind, and set up alike?

meshloom check                                                            the GPUs of this machine, or its processor
srun torchrun … -m meshloom.launch.cli check --folder /shared/outputs     all nodes of a job
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ..config.progress_bar import progress
from ..trainer.launching import under_torchrun, visible_gpus
from .torchrun import TorchRun

if TYPE_CHECKING:
    from ..trainer.preflight.measures import Report


def main(argv: Sequence[str]) -> int:
    """Check, print a table and what is wrong. Returns 0, or 1 if something is."""
    parser = argparse.ArgumentParser("meshloom check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", default="outputs", help="folder that runs write to (default: %(default)s)")
    parser.add_argument("--nproc", type=int, help="processes on this machine (default: one a GPU, or two)")
    arguments = parser.parse_args(list(argv))
    if under_torchrun():
        return check(Path(arguments.folder))
    count = arguments.nproc or visible_gpus() or 2
    words = ["-m", "meshloom.launch.cli", "check", f"--folder={arguments.folder}"]
    return TorchRun(["--standalone", f"--nproc-per-node={count}", *words]).run()


def check(folder: Path) -> int:
    """Check as one of torchrun's processes. Rank 0 prints; the code is the same on all."""
    from ..parallel.config import ParallelConfig
    from ..parallel.layout import Layout
    from ..parallel.mesh import Mesh, environment_world_size, pick_device
    from ..trainer.preflight.check import Check
    from ..trainer.preflight.judge import findings

    mesh = Mesh.connect(Layout.plan(ParallelConfig(), environment_world_size()), pick_device())
    try:
        run = Check(mesh, folder, whole=True)
        parts = list(run.parts())
        for number, (told, measure) in enumerate(parts, 1):
            with progress(f"{number}/{len(parts)} {told}", quiet=not mesh.is_main, announce=True):
                measure()
        reports = run.report()
        found = findings(reports) if reports else []
        if mesh.is_main:
            print("\n".join([*table(reports), *(f"! {each}" for each in found)] or [""]))
            print("nothing is wrong" if not found else f"{len(found)} found", file=sys.stderr)
        return int(mesh.any(bool(found)))
    finally:
        mesh.close()


def table(rows: Sequence[Report]) -> list[str]:
    """Return the lines of a table: a row for each rank, then storage and versions."""
    from ..trainer.preflight.judge import usual_rate

    head = ("rank", "host", "device", "product", "of its kind", "copy", "links", "slowest link")
    cells: list[tuple[str, ...]] = [head]
    for each in rows:
        usual = usual_rate(each.device, "product")
        slowest = min(each.links, key=lambda peer: each.links[peer], default=None)
        cells.append(
            (
                str(each.rank),
                each.host,
                each.device,
                "–" if each.product is None else f"{each.product / 1e12:.3g} TFLOP/s",
                "–" if usual is None or each.product is None else f"{each.product / usual:.0%}",
                "–" if each.copy is None else f"{each.copy / 1e9:.3g} GB/s",
                f"{median(each.links.values()) / 1e9:.3g} GB/s" if each.links else "–",
                "–" if slowest is None else f"{each.links[slowest] / 1e9:.3g} GB/s to {slowest}",
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    for each in rows:
        if each.write is not None:
            renaming = each.storage or "renaming is atomic"
            lines.append(f"{each.host}: storage takes {each.write / 1e6:.0f} MB/s, flushed; {renaming}")
    return [*lines, ", ".join(f"{name} {version}" for name, version in (rows[0].versions.items() if rows else ()))]
