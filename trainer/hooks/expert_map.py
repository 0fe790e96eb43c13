"""The load of each expert of a run's mixtures: files and pictures beside the run, over time and by data source.

Shape legend: L layers with a mixture, E experts, S sources, W windows of steps.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models.mixture.charges import share_of
from ..loop import Loop
from .base import Hook
from .expert_pictures import heat_map, heat_map_svg

log = logging.getLogger(__name__)

MOST_WINDOWS = 256
"""Windows in load.npz; when there are more, neighbours are added up."""


def mutual_information(counts_SLE: torch.Tensor) -> torch.Tensor:
    """Compute the mutual information of source and expert in each layer, in nats, (L,), with equal weight of the sources.

    0 if all sources use the experts alike; ln S if no expert serves two of them. counts_SLE: assignments of each source.
    """
    share_SLE = counts_SLE / counts_SLE.sum(-1, keepdim=True).clamp(min=1)
    mean_LE = share_SLE.mean(0)
    return torch.special.entr(mean_LE).sum(-1) - torch.special.entr(share_SLE).sum(-1).mean(0)


@dataclass(frozen=True)
class Window:
    """The assignments (L, E) of all steps from `first` to `last`, both counted from 1."""

    first: int
    last: int
    counts_LE: torch.Tensor


class ExpertMap(Hook):
    """Writes `experts/` in the run's folder. Runs on one rank. Counts stay on the device until they are written.

    load.npz      assignments in windows of steps: layers (L,), first and last (W,), assignments (W, L, E)
    load.svg      the same as loads, 1 for an even one: a band for each layer, a row for each expert
    sources.json  assignments of each source's validation samples at the last evaluation
    sources.svg   the same as loads within a source
    """

    alone = True
    of_one_run = True

    def __init__(self, layers: Sequence[int], folder: Path) -> None:
        self._layers, self._folder = list(layers), folder
        self._windows: list[Window] = []
        self._counted: dict[int, torch.Tensor] = {}  # step → assignments (L, E) of steps that may be taken again
        self._length = 1
        self._given_up = False

    def on_run_accepted(self, loop: Loop) -> None:
        """Read the windows of the run so far; those of steps that are repeated are dropped."""
        path = self._folder / "load.npz"
        if loop.progress.step and path.exists():
            self._try(lambda: self._read(path, loop.progress.step))

    def before_update(self, loop: Loop) -> None:
        """Note the step's counts, on the device. A step that is taken again replaces itself."""
        counts_LE = loop.engine.assignments()
        if counts_LE is not None and not self._given_up:
            self._counted[loop.progress.step + 1] = counts_LE

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        """Add the step's counts to the window: now it will not be taken again."""
        step = row["step"]
        counts_LE = self._counted.pop(step, None)
        if counts_LE is not None and not self._given_up:
            self._windows.append(Window(step, step, counts_LE))
            self._merge()

    def on_routed(self, loop: Loop, counts: Mapping[str, torch.Tensor]) -> None:
        """Write what the sources' validation samples were routed to. counts: source → assignments (L, E)."""
        counts_SLE = torch.stack(list(counts.values())).cpu()
        row = {
            "step": loop.progress.step,
            "layers": self._layers,
            "information": mutual_information(counts_SLE).tolist(),
            "sources": {name: each.long().tolist() for name, each in zip(counts, counts_SLE, strict=True)},
        }
        self._try(lambda: self._write("sources.json", (json.dumps(row) + "\n").encode()))
        loads_LSE = share_of(counts_SLE).transpose(0, 1).numpy()
        names, ends = [name or "all" for name in counts], ("expert 0", f"expert {loads_LSE.shape[2] - 1}")
        self._draw(loop, "sources", loads_LSE, "Load of each expert, by source", names, ends)

    def on_evaluate(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write the windows so far, and draw them."""
        self._show(loop)

    def on_checkpoint(self, loop: Loop, row: dict[str, Any]) -> None:
        """Write the windows so far, so that a resumed run finds them."""
        self._try(self._write_windows)

    def on_run_end(self, loop: Loop, output_dir: Path) -> None:
        """Write and draw what is left."""
        self._show(loop)

    def _merge(self) -> None:
        """Add windows that end within the same multiple of the length. The length doubles when there are too many."""
        too_many = len(self._windows) > MOST_WINDOWS
        if too_many:
            self._length *= 2
            self._to_host()
        kept, changed = ([], self._windows) if too_many else (self._windows[:-2], self._windows[-2:])
        for window in changed:
            if kept and (kept[-1].last - 1) // self._length == (window.last - 1) // self._length:
                before = kept.pop()
                window = Window(before.first, window.last, before.counts_LE.to(window.counts_LE.device) + window.counts_LE)
            kept.append(window)
        self._windows = kept

    def _to_host(self) -> None:
        self._windows = [replace(window, counts_LE=window.counts_LE.cpu()) for window in self._windows]

    def _read(self, path: Path, done: int) -> None:
        with np.load(path) as found:
            if found["layers"].tolist() != self._layers:
                return
            windows = zip(found["first"].tolist(), found["last"].tolist(), found["assignments"], strict=True)
            self._windows = [
                Window(first, last, torch.from_numpy(counts).double()) for first, last, counts in windows if last <= done
            ]
        while self._length < max((window.last - window.first + 1 for window in self._windows), default=1):
            self._length *= 2

    def _show(self, loop: Loop) -> None:
        self._try(self._write_windows)
        if not self._windows:
            return
        counts_LEW = torch.stack([window.counts_LE for window in self._windows], dim=-1)
        loads_LEW = share_of(counts_LEW.transpose(1, 2)).transpose(1, 2).numpy()
        ends = f"step {self._windows[0].first}", f"step {self._windows[-1].last}"
        self._draw(loop, "load", loads_LEW, "Load of each expert over time", (), ends)

    def _draw(
        self, loop: Loop, name: str, loads_LRC: np.ndarray, title: str, rows: Sequence[str], ends: tuple[str, str]
    ) -> None:
        svg = heat_map_svg(loads_LRC, title=title, layers=self._layers, rows=rows, ends=ends)
        self._try(lambda: self._write(f"{name}.svg", svg.encode()))
        picture = heat_map(loads_LRC)
        for hook in loop.hooks:
            hook.on_picture(loop, f"experts/{name}", picture)

    def _write_windows(self) -> None:
        self._to_host()
        arrays = {
            "layers": np.array(self._layers),
            "first": np.array([window.first for window in self._windows]),
            "last": np.array([window.last for window in self._windows]),
            "assignments": np.array([window.counts_LE.numpy() for window in self._windows]).astype(np.int64),
        }
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, **arrays)
        self._write("load.npz", data.getvalue())

    def _write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / f"{name}.tmp"
        draft.write_bytes(data)
        draft.replace(self._folder / name)

    def _try(self, action: Callable[[], None]) -> None:
        """Do something with files; if that fails, warn and do nothing from then on. The run goes on."""
        if self._given_up:
            return
        try:
            action()
        except (OSError, ValueError, KeyError) as error:
            self._given_up = True
            log.warning("%s gets no more of this run: %s; training goes on", self._folder, error)
