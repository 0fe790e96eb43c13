"""A hook that injects faults into the rank that it runs on, at a step and in a part of the step.

Parts of a step are known by the heartbeat: a fault strikes right after the rank has noted that it begins this part. Before it
strikes, it leaves a file, so that it strikes once for a run, and so that it is known when.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import contextlib
import errno
import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from meshloom.parallel.fragment import Fragment
from meshloom.parallel.heartbeat import Phase
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.loop import Loop

from .faults import CRASHES, ENDLESS, HANGS, LOST_PARENTS, Fault, read_faults

REAL_TIME = time.time
BALLAST = "ballast"
"""Name of the file that fills the disk."""
FULL_SECONDS = 2.0
"""Time for which the disk is full."""
SPIKE_FACTOR = 1e6
SLOW_STEPS = 32
"""A slow rank is slow for so many steps: of 20 that are looked at together, more than half then are."""


def fired_file(folder: Path, number: int) -> Path:
    """Return the file that a fault leaves before it strikes."""
    return folder / f"fired-{number}.json"


class Injector(Hook):
    """Injects the faults of `faults.json` in a folder. Listed in `trainer.hooks`."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._faults = list(enumerate(read_faults(self._folder / "faults.json")))
        self._armed: list[tuple[int, Fault]] = []  # strike in the next pass of this step
        self._mine: list[tuple[int, Fault]] = []
        self._beat: Callable[..., None] | None = None
        self._slow = self._slowed = 0
        self._handles: list[Any] = []

    def on_run_begin(self, loop: Loop) -> None:
        """Listen to the heartbeat, and to what the model computes."""
        self._loop = loop
        (self._folder / "ranks").mkdir(exist_ok=True)
        (self._folder / "ranks" / str(os.getpid())).touch()
        self._copies = _copies(loop)
        rank = loop.mesh.rank
        self._mine = [(number, each) for number, each in self._faults if each.rank == rank or each.kind == "bad_sample"]
        heartbeat = loop.mesh.heartbeat
        before = self._beat = heartbeat.beat

        def beat(phase: Phase, micro_batch: int = 0) -> None:
            before(phase, micro_batch)
            self._at(phase.word, heartbeat.step)

        heartbeat.beat = beat  # type: ignore[method-assign]
        module = loop.engine.module
        for stage in module if isinstance(module, torch.nn.ModuleList) else [module]:
            blocks: dict[int, torch.nn.Module] = stage.block_modules()  # type: ignore[operator]
            self._handles += [stage.register_forward_pre_hook(self._see_tokens)]
            self._handles += [block.register_forward_hook(self._spoil) for block in blocks.values()]
            self._handles += [block.attention.register_forward_pre_hook(self._slow_down) for block in blocks.values()]  # type: ignore[union-attr,operator]
        self._rows: torch.Tensor | None = None

    def close(self) -> None:
        """Leave the heartbeat as it was, for the run that goes on from an earlier checkpoint in the same process."""
        for handle in self._handles:
            handle.remove()
        if self._beat is not None:
            del self._loop.mesh.heartbeat.beat  # type: ignore[misc]

    def _slow_down(self, *_: object) -> None:
        """Sleep inside of a layer, once a step."""
        heartbeat = self._loop.mesh.heartbeat
        if self._slow and heartbeat.phase is Phase.FORWARD and self._slowed != heartbeat.step:
            self._slow, self._slowed = self._slow - 1, heartbeat.step
            time.sleep(self._seconds)

    def _at(self, phase: str, step: int) -> None:
        """Strike what is due in this part of this step."""
        for number, fault in self._mine:
            again = fault.kind in ENDLESS
            if step < fault.step or phase != fault.phase or (not again and fired_file(self._folder, number).exists()):
                continue
            if fault.kind in ("nan_activation", "nan_gradient", "spike", "flip_activation", "flip_gradient"):
                if (number, fault) not in self._armed:
                    self._armed.append((number, fault))
                continue
            if fault.kind != "bad_sample" and (self._fire(number, fault, {}) or again):
                self._strike(number, fault)

    def _fire(self, number: int, fault: Fault, more: dict[str, Any]) -> bool:
        """Leave a fault's file. Return False if it has struck before."""
        heartbeat = self._loop.mesh.heartbeat
        told = {"time": REAL_TIME(), "step": heartbeat.step, "phase": heartbeat.phase.word, "pid": os.getpid(), **more}
        try:
            descriptor = os.open(fired_file(self._folder, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump(told, file)
        return True

    def _strike(self, number: int, fault: Fault) -> None:
        kind = fault.kind
        if kind in (*CRASHES, *HANGS):
            _end_or_hang(kind)
        elif kind in ENDLESS:
            _end_or_hang("kill")
        elif kind == "kill_node":
            agent = multiprocessing.parent_process()
            assert agent is not None and agent.pid is not None
            os.kill(agent.pid, signal.SIGKILL)
        elif kind in LOST_PARENTS:
            with contextlib.suppress(ProcessLookupError):  # it was killed a moment ago, and its ranks are about to end
                os.kill(int((self._folder / f"{kind.partition('_')[2]}.pid").read_text()), signal.SIGKILL)
        elif kind == "slow":
            self._slow, self._seconds = SLOW_STEPS, fault.size
        elif kind == "clock":
            time.time = lambda: REAL_TIME() + 3600 * fault.size
        elif kind == "full_disk":
            _fill(self._loop.output_dir / BALLAST)
        elif kind in ("flip_weight", "flip_optimizer"):
            self._flip_state(number, fault)

    def _flip_state(self, number: int, fault: Fault) -> None:
        """Flip a bit of a weight or of the optimizer's state."""
        weights = fault.kind == "flip_weight"
        found = [each for each in self._loop.engine.fragments() if (each.role == "weight") == weights and _floating(each)]
        if not found:  # a pipeline's rank, or an optimizer that has no state yet
            fired_file(self._folder, number).unlink()
            return
        chance = random.Random(fault.seed)
        fragment = chance.choice(found)
        told = flip_bit(fragment.tensor, chance)
        copies = self._copies.get((fragment.name, fragment.box.offsets, fragment.box.shape), 1)
        file = fired_file(self._folder, number)
        file.write_text(json.dumps({**json.loads(file.read_text()), **told, "array": fragment.key, "copies": copies}))

    def _see_tokens(self, _module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        """Note which rows of the micro-batch are bad samples."""
        self._rows = None
        bad = [(number, each) for number, each in self._mine if each.kind == "bad_sample"]
        if not bad or inputs[0].dtype != torch.int64:
            return
        rows = torch.zeros(len(inputs[0]), dtype=torch.bool)
        for number, fault in bad:
            tokens = torch.as_tensor(self._loop.batches.samples[int(fault.size)].tokens)
            if len(tokens) != inputs[0].shape[1] or not bool(tokens.any()):  # a part of it, or it is left out by now
                continue
            hit = (inputs[0] == tokens).all(1)
            if bool(hit.any()):
                self._fire(number, fault, {})
            rows |= hit
        self._rows = rows

    def _spoil(self, block: torch.nn.Module, _inputs: object, output: Any) -> Any:
        """Spoil what a block computes: of bad samples always, and once where a fault is armed."""
        x_BSD = output[0] if isinstance(output, tuple) else output
        if self._rows is not None and bool(self._rows.any()):
            x_BSD = x_BSD * torch.where(self._rows, torch.nan, 1.0).to(x_BSD.dtype)[:, None, None]
        for number, fault in [*self._armed] if torch.is_grad_enabled() else []:
            self._armed.remove((number, fault))
            chance = random.Random(fault.seed)
            if fault.kind == "nan_activation" and self._fire(number, fault, {}):
                x_BSD = x_BSD * math.nan
            elif fault.kind == "flip_activation" and self._fire(number, fault, {}):
                x_BSD = x_BSD + (_flipped(x_BSD, chance, fired_file(self._folder, number)) - x_BSD).detach()
            elif fault.kind in ("nan_gradient", "spike", "flip_gradient"):
                x_BSD = self._with_spoilt_gradient(x_BSD, number, fault, chance)
        return (x_BSD, *output[1:]) if isinstance(output, tuple) else x_BSD

    def _with_spoilt_gradient(self, x_BSD: torch.Tensor, number: int, fault: Fault, chance: random.Random) -> torch.Tensor:
        """Return the activation with a hook that spoils the gradient that comes back to it, once."""
        x_BSD = x_BSD.view_as(x_BSD)

        def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
            if not self._fire(number, fault, {}):
                return None
            if fault.kind == "flip_gradient":
                return _flipped(gradient, chance, fired_file(self._folder, number))
            return gradient * (math.nan if fault.kind == "nan_gradient" else SPIKE_FACTOR)

        x_BSD.register_hook(spoil)
        return x_BSD


def _end_or_hang(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "exit":
        os._exit(7)
    elif kind == "raise":
        raise ValueError("the fault injector says so")
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang":
        time.sleep(3600)


def _fill(path: Path) -> None:
    """Fill the disk for a while. A process of its own makes room again."""
    if os.fork() == 0:
        with path.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass
            try:
                while True:
                    file.write(bytes(1))
            except OSError:
                pass
            time.sleep(FULL_SECONDS)
        path.unlink()
        os._exit(0)


def flip_bit(tensor: torch.Tensor, chance: random.Random) -> dict[str, Any]:
    """Flip one bit of one element of a tensor, in place. Return which, and its value before and after."""
    flat = tensor.detach().view(-1)
    element = chance.randrange(flat.numel())
    bits = 8 * flat.element_size()
    bit = chance.randrange(bits)
    before = float(flat[element])
    words = flat.view({16: torch.int16, 32: torch.int32, 64: torch.int64}[bits])
    mask = 1 << bit
    words[element] ^= mask - (1 << bits) if bit == bits - 1 else mask
    return {"element": element, "bit": bit, "before": repr(before), "after": repr(float(flat[element]))}


def _flipped(tensor: torch.Tensor, chance: random.Random, file: Path) -> torch.Tensor:
    """Return a copy of a tensor with one bit flipped, and note it in the fault's file."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    told = flip_bit(copy, chance)
    file.write_text(json.dumps({**json.loads(file.read_text()), **told}))
    return copy


def _floating(fragment: Fragment) -> bool:
    return fragment.tensor.is_floating_point() and fragment.tensor.dim() > 0 and fragment.tensor.is_contiguous()


def _copies(loop: Loop) -> dict[tuple[Any, ...], int]:
    """Return by name and box how many ranks, of those that are compared, hold a part of a weight. A collective.

    The optimizer's state is cut as the weights are; it does not exist yet when a run begins.
    """
    at = loop.mesh.coordinates
    place = at["pp"], at["tp"]
    mine = [(each.name, each.box.offsets, each.box.shape) for each in loop.engine.fragments() if each.role == "weight"]
    everywhere = loop.mesh.gather_objects((place, mine))
    return {key: sum(there == place and key in keys for there, keys in everywhere) for key in mine}
