"""Run a check on all ranks: the short form before each start, the whole one for `meshloom check`."""

from __future__ import annotations

import functools
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...config.per_host import is_first_on_host
from ...parallel.mesh import Mesh
from ..watch.incidents import Incident, IncidentLog
from .judge import findings
from .measures import (
    CPU,
    GPU,
    GPU_SHORT,
    Report,
    Sizes,
    copy_rate,
    device_name,
    link_rate,
    pairings,
    product_rate,
    storage_rate,
    versions,
)

log = logging.getLogger(__name__)

Part = tuple[str, Callable[[], None]]


@dataclass
class Check:
    """One rank's part of a check. Every rank runs the same parts in the same order.

    whole  also the links, and products and copies of processors
    """

    mesh: Mesh
    folder: Path
    whole: bool
    _product: float | None = None
    _copy: float | None = None
    _links: dict[int, float] = field(default_factory=dict[int, float])
    _write: float | None = None
    _storage: str = ""

    @property
    def _sizes(self) -> Sizes:
        if self.mesh.device.type != "cuda":
            return CPU
        return GPU if self.whole else GPU_SHORT

    def parts(self) -> Iterator[Part]:
        """Yield what is measured, to be called in order."""
        if self.whole or self.mesh.device.type == "cuda":
            yield "matrix product", self._measure_product
            yield "copy in memory", self._measure_copy
        yield "storage", self._measure_storage
        if self.whole:
            rounds = list(pairings(self.mesh.layout.world_size))
            for number, pairs in enumerate(rounds, start=1):
                yield f"links, round {number} of {len(rounds)}", functools.partial(self._measure_links, pairs)

    def _measure_product(self) -> None:
        self._product = product_rate(self.mesh.device, self._sizes)

    def _measure_copy(self) -> None:
        self._copy = copy_rate(self.mesh.device, self._sizes)

    def _measure_storage(self) -> None:
        if is_first_on_host():
            self._write, self._storage = storage_rate(self.folder)

    def _measure_links(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Measure this rank's pair of a round; all begin together."""
        self.mesh.barrier()
        for one, other in pairs:
            if self.mesh.rank in (one, other):
                peer = other if self.mesh.rank == one else one
                self._links[peer] = link_rate(peer, self.mesh.device, self._sizes)

    def report(self) -> list[Report]:
        """Exchange what was found. Returns the reports of all ranks on rank 0, and nothing on the others."""
        self.mesh.barrier()
        mine = Report(
            self.mesh.rank,
            socket.gethostname(),
            device_name(self.mesh.device),
            self._product,
            self._copy,
            self._links,
            self._write,
            self._storage,
            time.time(),
            versions(),
        )
        store = self.mesh.store("check")
        store.set(f"{self.mesh.rank}", json.dumps(asdict(mine)))
        if not self.mesh.is_main:
            return []
        rows: list[dict[str, Any]] = [json.loads(store.get(f"{rank}")) for rank in range(self.mesh.layout.world_size)]
        for row in rows:
            row["links"] = {int(peer): rate for peer, rate in row["links"].items()}  # JSON knows no other names
        return [Report(**row) for row in rows]


def check_at_start(mesh: Mesh, output_dir: Path) -> None:
    """Run the short form before a run, and warn of what it finds. Every rank calls it."""
    check = Check(mesh, output_dir, whole=False)
    for told, measure in check.parts():  # none waits for other ranks
        try:
            measure()
        except (RuntimeError, OSError) as error:  # such as a GPU that others have filled
            log.warning("launch.check: %s on rank %d was not measured: %s", told, mesh.rank, error)
    reports = check.report()
    for finding in findings(reports) if mesh.is_main else ():
        log.warning("launch.check: %s", finding)
        IncidentLog(output_dir).write(Incident("check", finding))
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(mesh.device)
