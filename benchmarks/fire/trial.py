"""Run a schedule of faults: launcher, agent and ranks, all forked from processes that have imported everything.

`Bench` holds Python's fork server, from which ranks are forked. A trial forks a launcher, and that torchrun's agent. So a whole
run of a few processes takes seconds, and goes through the same code as `meshloom train`.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

import psutil

from meshloom.launch import forked
from meshloom.launch.nodes.part import Part, Rules
from meshloom.launch.torchrun import RANK
from meshloom.trainer.watch.incidents import read_incidents

from .faults import BATCH, COMPARE_EVERY, EVALUATE_EVERY, LOST_PARENTS, SAVE_EVERY, Layout, Schedule
from .injector import fired_file
from .rows import Result

RECIPE = (
    "recipe=quickstart", "data=synthetic", "data.vocabulary=61", "data.seq_len=16", "data.validation_samples=8",
    "model.dim=16", "model.layers=2", "model.heads=2", "model.kv_heads=2", "model.ffn_dim=24", "precision=fp64",
    f"batch.samples={BATCH}", "batch.micro=2", "trainer.tokens=null", f"trainer.eval_every={EVALUATE_EVERY}",
    "trainer.eval_samples=8", f"checkpoint.every={SAVE_EVERY}", "checkpoint.keep=3", "trainer.sample_prompt=null",
    f"trainer.compare_replicas_every={COMPARE_EVERY}", "logging.progress=false", "launch.check=false",
    "parallel.timeout=200",
    "checkpoint.timeout=120",
)  # fmt: skip
PATIENCE = 330.0
"""Seconds after which a run counts as one that hangs, and nobody has ended it."""
ORPHAN_PATIENCE = 75.0
DISK_MIB = 24
RESTARTS = 6
JOIN_SECONDS = 30.0
KILLED = 128 + signal.SIGKILL
STARTS = 4
"""At most so many launchers are started for a run: what ends with a launcher is started again by hand."""


def left_out(result: Result) -> tuple[int, ...]:
    """Return the samples that a run has met as bad ones, and leaves out by `trainer.on_bad_step=rewind`."""
    faults = [result.schedule.faults[number] for number in sorted(result.fired)]
    return tuple(int(each.size) for each in faults if each.kind == "bad_sample")


class Bench:
    """Processes that have imported what runs need."""

    def __init__(self) -> None:
        """Import, and start the fork server."""
        multiprocessing.set_forkserver_preload([*forked.PRELOADED, "meshloom.benchmarks.fire.warm"])
        forkserver.ensure_running()
        forked.prepare()

        if not forked.can_fork():
            raise SystemExit("ranks can't be forked here")

    def run(self, schedule: Schedule, folder: Path) -> Result:
        """Run a schedule in an empty folder, to its end, and as often as its launcher is lost."""
        result = Result(schedule)
        schedule.write(folder / "faults.json")
        disk = _small_disk(folder) if any(each.kind == "full_disk" for each in schedule.faults) else None
        began = time.monotonic()
        try:
            while len(result.codes) < STARTS:
                lost = len(_fired(schedule, folder, LOST_PARENTS))
                self._start(schedule, folder, result)
                if result.hung or len(_fired(schedule, folder, LOST_PARENTS)) == lost:
                    break
            _read(result, folder)
        finally:
            result.seconds = time.monotonic() - began
            if disk is not None:
                subprocess.run(["umount", "-l", str(disk)], check=False)
        return result

    def undisturbed(self, folder: Path, steps: int, left_out: tuple[int, ...] = ()) -> dict[int, float]:
        """Return the losses of a run on one process without faults."""
        out = folder / "run"
        words = [*RECIPE, f"trainer.steps={steps}", "checkpoint.every=0", "resume=auto", f"output_dir={out}"]
        child = os.fork()
        if child == 0:
            _redirect(folder / "log")
            try:
                _leave_out(out / "checkpoints", left_out)
                from meshloom.launch.rank import main

                os._exit(main(words))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"the undisturbed run failed:\n{(folder / 'log').read_text()}")
        return read_losses(out)[0]

    @staticmethod
    def _start(schedule: Schedule, folder: Path, result: Result) -> None:
        """Start a launcher for each machine, and wait for their ends and those of their ranks."""
        words = [*RECIPE, *schedule.layout.words, f"trainer.steps={schedule.steps}", *schedule.words, "resume=auto"]
        words += [f"trainer.hooks=[{{_target_: meshloom.benchmarks.fire.injector.Injector, folder: '{folder}'}}]"]
        words += [f"launch.nproc={schedule.layout.ranks // schedule.layout.machines}", f"output_dir={folder / 'run'}"]
        deadline, launchers = time.monotonic() + PATIENCE, []
        for machine in range(schedule.layout.machines):
            if machine == schedule.layout.machines - 1:
                _come_late(schedule, folder)
            launcher = os.fork()
            if launcher == 0:
                _launch(folder, machine, _arguments(schedule.layout, words, folder))
            launchers.append(launcher)
        codes = [_wait(launcher, max(0.1, deadline - time.monotonic())) for launcher in launchers]
        for launcher, code in zip(launchers, codes, strict=True):
            if code is None:
                result.hung = True
                os.kill(launcher, signal.SIGKILL)
                os.waitpid(launcher, 0)
        # Behind that of a machine that was killed, that of the others says how the run has ended.
        result.codes += sorted((None if code is None or code < 0 else code for code in codes), key=lambda code: code != KILLED)
        ended = time.monotonic()
        deadline = ended + (0.0 if result.hung else ORPHAN_PATIENCE)
        while (left := _processes(folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        result.outlived = max(result.outlived, time.monotonic() - ended)
        result.orphans += 0 if result.hung else len(left)
        for each in left:
            with contextlib.suppress(psutil.Error):
                each.kill()


def _arguments(layout: Layout, words: list[str], folder: Path) -> list[str]:
    """Return the arguments of an agent: torchrun's, or a machine's part in a run on several."""
    processes = layout.ranks // layout.machines
    if layout.machines == 1:
        return ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={RESTARTS}", "-m", RANK, *words]
    nodes = f"1:{layout.machines}"
    rules = Rules(processes, layout.machines, {n + 1: [] for n in range(layout.machines)}, RESTARTS, JOIN_SECONDS)
    return [Part(str(folder / "run"), rules, [*words, f"launch.nodes='{nodes}'"]).as_word()]


def _come_late(schedule: Schedule, folder: Path) -> None:
    """Wait before the last machine is started, where it is to be late."""
    for number, fault in enumerate(schedule.faults):
        if fault.kind == "late_node":
            time.sleep(fault.size)
            told = {"time": time.time(), "step": 0, "phase": "start", "pid": os.getpid()}
            fired_file(folder, number).write_text(json.dumps(told))


def _launch(folder: Path, machine: int, arguments: list[str]) -> None:
    """Be a launcher: fork an agent, and end with its exit code."""
    os.setsid()
    _redirect(folder / "log")
    os.environ["MESHLOOM_FAILURE_DOMAIN"] = str(machine)
    name = f"-{machine}" if machine else ""
    (folder / f"launcher{name}.pid").write_text(str(os.getpid()))
    agent = os.fork()
    if agent == 0:
        (folder / f"agent{name}.pid").write_text(str(os.getpid()))
        # The fork server is another process's child, and lives: nothing is to be started.
        forkserver._forkserver.ensure_running = forkserver.ensure_running = lambda: None
        from meshloom.launch import agent as module

        code = 1
        with contextlib.suppress(BaseException):
            code = module.main(arguments)
        module.leave(code)
    _, status = os.waitpid(agent, 0)
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _redirect(log: Path) -> None:
    """Send what this process prints to a file."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _wait(pid: int, seconds: float) -> int | None:
    """Return the exit code of a child, negative for a signal; None: it still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def _processes(folder: Path) -> list[psutil.Process]:
    """Return the agent and the ranks of a run that live, by the pids that they have left."""
    found = []
    pids = {int(path.read_text()) for path in folder.glob("*.pid")} | {int(path.name) for path in folder.glob("ranks/*")}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _fired(schedule: Schedule, folder: Path, kinds: tuple[str, ...]) -> list[int]:
    return [n for n, each in enumerate(schedule.faults) if each.kind in kinds and fired_file(folder, n).exists()]


def _read(result: Result, folder: Path) -> None:
    for number in range(len(result.schedule.faults)):
        with contextlib.suppress(OSError, ValueError):
            result.fired[number] = json.loads(fired_file(folder, number).read_text())
    result.losses, result.step_seconds = read_losses(folder / "run")
    result.incidents = list(read_incidents(folder / "run"))
    with contextlib.suppress(OSError):
        result.said = (folder / "log").read_text(errors="replace")


def read_losses(out: Path) -> tuple[dict[int, float], float]:
    """Return the loss of each step, of its newest row, and the usual seconds of a step."""
    losses: dict[int, float] = {}
    seconds: list[float] = []
    with contextlib.suppress(FileNotFoundError):
        for line in (out / "metrics.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if "loss" in row:
                    losses[row["step"]] = row["loss"]
                    seconds.append(row["step_seconds"])
    return losses, sorted(seconds)[len(seconds) // 2] if seconds else 0.0


def _leave_out(checkpoints: Path, samples: tuple[int, ...]) -> None:
    """Write a journal by hand that leaves out samples, as docs/resilience.md says."""
    if not samples:
        return
    from meshloom.trainer.run import prepared_data
    from meshloom.trainer.schema import make_composer
    from meshloom.trainer.typed import typed_config

    config, _ = typed_config(make_composer().compose(RECIPE).config)
    fingerprint = prepared_data(config.data, config.seed, config.model.vocabulary).fingerprint
    entry = {"step": 1, "to": 0, "ranges": [[each, each + 1] for each in samples], "reason": "by hand", "data": fingerprint}
    checkpoints.mkdir(parents=True)
    (checkpoints / "rewinds.json").write_text(json.dumps({"rewinds": [entry]}))


def _small_disk(folder: Path) -> Path:
    """Mount a small disk in memory on the run's folder. Needs root."""
    disk = folder / "run"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", str(disk)], check=True)
    return disk


def clear(folder: Path) -> None:
    """Remove a trial's folder."""
    shutil.rmtree(folder, ignore_errors=True)
