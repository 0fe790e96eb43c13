"""Runs on several machines that lose some: what is said, how long until the next step, and whether the losses stay the same.

    python benchmarks/lost_nodes.py                        every story once, a markdown table
    python benchmarks/lost_nodes.py leader join --ranks 2  some of them, two ranks a machine

A machine is a launcher on this one, with its agent, ranks and keepers, and a failure domain of its own. Losses are compared in
float64 with those of one process that nothing has happened to.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from meshloom.trainer.watch.incidents import read_incidents

RECIPE = [
    "recipe=quickstart", "data=synthetic", "data.vocabulary=61", "data.seq_len=16", "data.validation_samples=12",
    "model.dim=16", "model.layers=2", "model.heads=2", "model.kv_heads=2", "model.ffn_dim=24", "precision=fp64",
    "batch.samples=9", "batch.micro=2", "schedule=constant", "schedule.warmup=2", "trainer.tokens=null", "trainer.eval_every=0",
    "trainer.sample_prompt=null", "checkpoint.keep=2", "logging.progress=false", "launch.join_seconds=60", "launch.check=false",
]  # fmt: skip
HOOK = '''
import time
from pathlib import Path
from meshloom.trainer.hooks.base import Hook

class Hold(Hook):
    """Makes steps last as long as a file is there."""
    alone = True
    def __init__(self, file, seconds, begin=25):
        self.file, self.seconds, self.begin = Path(file), seconds, begin
    def on_step_begin(self, loop):
        deadline = time.monotonic() + (self.seconds if loop.progress.step >= self.begin else 0.0)
        while self.file.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
'''
HELD_SECONDS = 1.0
"""A step from the 26th on, until the run has gone on."""
PATIENCE = 600.0


@dataclass
class Machines:
    """The machines of one run. began: when a fault was injected."""

    folder: Path
    words: list[str]
    ranks: int
    launchers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    began: float = 0.0

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def start(self, name: str) -> None:
        """Start a machine."""
        variables = {**os.environ, "MESHLOOM_FAILURE_DOMAIN": name, "OMP_NUM_THREADS": "1"}
        variables["PYTHONPATH"] = f"{self.folder}:{os.environ.get('PYTHONPATH', '')}"
        command = [sys.executable, "-m", "meshloom.launch.cli", "train", *self.words, f"launch.nproc={self.ranks}"]
        command.append(f"output_dir={self.out}")
        with (self.folder / f"{name}.log").open("ab") as log:
            self.launchers[name] = subprocess.Popen(command, env=variables, stdout=log, stderr=log)

    def processes(self, name: str, *, keepers: bool = False) -> list[psutil.Process]:
        """Return the agent, the fork server and the ranks of a machine, and its keepers if they are asked for."""
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.launchers[name].pid).children(recursive=True)
        kept = [each for each in found if _is_keeper(each)]
        return found if keepers else [each for each in found if each not in kept]

    def agent(self, name: str) -> psutil.Process:
        """Return the agent of a machine."""
        (agent,) = psutil.Process(self.launchers[name].pid).children()
        return agent

    def of_rank(self, rank: int) -> str:
        """Return the machine on which a rank runs."""
        pid = next(row["pid"] for row in json.loads((self.out / "ranks.json").read_text()) if row["rank"] == rank)
        return next(name for name in self.launchers if pid in {each.pid for each in self.processes(name)})

    def pids(self) -> set[int]:
        """Return the processes of the newest attempt's ranks."""
        return {row["pid"] for row in json.loads((self.out / "ranks.json").read_text())}

    def leader(self) -> str:
        """Return the machine that leads."""
        (term,) = sorted(self.out.glob(".nodes/*/term-*.json"))[-1:]
        pid = int(json.loads(term.read_text())["id"].rsplit("-", 2)[1])
        return next(name for name in self.launchers if self.agent(name).pid == pid)

    def follower(self) -> str:
        """Return a machine that does not lead, and on which rank 0 is not."""
        return next(name for name in self.launchers if name not in (self.leader(), self.of_rank(0)))

    def rows(self) -> list[dict]:
        """Return the rows of metrics that hold a loss, as they were written."""
        with contextlib.suppress(OSError):
            rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
            return [row for row in rows if "loss" in row]
        return []

    def await_step(self, step: int, after: float = 0.0) -> float:
        """Wait for a step that was written after a time. Return when it was written."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for row in self.rows():
                if row["step"] >= step and row["time"] > after:
                    return row["time"]
            if all(each.poll() is not None for each in self.launchers.values()):
                break
            time.sleep(0.05)
        raise SystemExit(f"step {step} did not come:\n{self.logs()}")

    def logs(self) -> str:
        """Return what all machines have printed."""
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def end(self) -> None:
        """End whatever is left."""
        for name, launcher in self.launchers.items():
            left = self.processes(name, keepers=True)
            launcher.kill()
            for each in left:
                with contextlib.suppress(psutil.Error):
                    each.kill()
            launcher.wait()
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if _is_keeper(each) and each.environ().get("MESHLOOM_TRIAL") == str(self.folder):
                    each.kill()


def _is_keeper(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any("keeper_main" in word for word in process.cmdline())
    return False


def _kill_all(processes: list[psutil.Process]) -> None:
    for each in processes:
        with contextlib.suppress(psutil.Error):
            each.kill()


def kill_agent(machines: Machines, name: str) -> None:
    """Kill the agent alone: its ranks die with it."""
    machines.agent(name).kill()


def kill_machine(machines: Machines, name: str) -> None:
    """Kill the launcher, the agent, the ranks and the keepers of a machine."""
    everything = machines.processes(name, keepers=True)
    machines.launchers[name].kill()
    _kill_all(everything)


def story_leader(machines: Machines) -> None:
    """kill -9 of the agent of the machine that leads"""
    kill_agent(machines, machines.leader())


def story_other(machines: Machines) -> None:
    """kill -9 of the agent of another machine"""
    kill_agent(machines, machines.follower())


def story_machine(machines: Machines) -> None:
    """kill -9 of all processes of rank 0's machine, with its keepers"""
    kill_machine(machines, machines.of_rank(0))


def story_two(machines: Machines) -> None:
    """kill -9 of the agents of two machines of three at once, that of rank 0 among them"""
    two = [machines.follower(), machines.of_rank(0)]
    for name in two:
        kill_agent(machines, name)


def story_launcher(machines: Machines) -> None:
    """kill -9 of a launcher: its machine saves and leaves"""
    machines.launchers[machines.follower()].kill()


def story_rank(machines: Machines) -> None:
    """kill -9 of one rank: all machines start again, and a restart is spent"""
    _kill_all([each for each in machines.processes("b") if each.environ().get("RANK") or _is_rank(each)][:1])


def _is_rank(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is not None and any("forkserver" in word for word in parent.cmdline())


def story_frozen(machines: Machines) -> None:
    """SIGSTOP of the leader's agent for 25 s: the others go on without it, then it comes back"""
    agent = machines.agent(machines.leader())
    agent.suspend()
    time.sleep(25)
    agent.resume()


def story_suspended(machines: Machines) -> None:
    """SIGSTOP of all processes of rank 0's machine for 40 s: the others take the run's folder from it, then it comes back"""
    name = machines.of_rank(0)
    everything = [psutil.Process(machines.launchers[name].pid), *machines.processes(name, keepers=True)]
    for each in everything:
        each.suspend()
    time.sleep(40)
    for each in everything:
        with contextlib.suppress(psutil.Error):
            each.resume()


def story_join(machines: Machines) -> None:
    """a further machine comes"""
    machines.start("d")


def story_replaced(machines: Machines) -> None:
    """the machine of rank 0 is killed, and a new one takes its place"""
    kill_machine(machines, machines.of_rank(0))
    machines.start("d")


STORIES: dict[str, tuple[Callable[[Machines], None], str, list[str]]] = {
    "leader": (story_leader, "2:3", []),
    "other": (story_other, "2:3", []),
    "machine": (story_machine, "2:3", []),
    "memory": (story_machine, "2:3", ["checkpoint.every=1000", "checkpoint.memory_every=5"]),
    "two": (story_two, "1:3", []),
    "launcher": (story_launcher, "2:3", []),
    "rank": (story_rank, "2:3", []),
    "frozen": (story_frozen, "2:3", []),
    "suspended": (story_suspended, "2:3", []),
    "join": (story_join, "3:4", ["launch.join_seconds=20"]),
    "replaced": (story_replaced, "3", []),
    "pipeline": (story_leader, "2:3", ["parallel.pp=3", "model.layers=3", "launch.placements={2: ['parallel.pp=2']}"]),
    "planned": (story_leader, "2:3", ["parallel.pp=3", "model.layers=3"]),
}
"""Name → the fault, launch.nodes, and further words."""


def run_story(name: str, ranks: int, steps: int, reference: dict[int, float], verbose: bool) -> str:
    """Run a story and return its row of the table."""
    fault, nodes, more = STORIES[name]
    saving = ["checkpoint.every=10"] if not any(word.startswith("checkpoint.every") for word in more) else []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "injected.py").write_text(HOOK)
        (folder / "hold").touch()
        hook = f"trainer.hooks=[{{_target_: injected.Hold, file: {folder / 'hold'}, seconds: {HELD_SECONDS}}}]"
        os.environ["MESHLOOM_TRIAL"] = place
        words = [*RECIPE, f"trainer.steps={steps}", hook, f"launch.nodes={nodes}", *saving, *more]
        machines = Machines(folder, words, ranks)
        try:
            for each in "abc":
                machines.start(each)
            machines.await_step(25)
            before, began = machines.pids(), time.time()
            fault(machines)
            last = max(row["step"] for row in machines.rows() if row["time"] <= began + 0.2)
            came, step = _next_attempt(machines, before)
            (folder / "hold").unlink()
            machines.await_step(steps, began)
            codes = _wait(machines)
            if verbose:
                print(machines.logs(), file=sys.stderr)
            return _row(name, fault.__doc__ or "", machines, came - began, last - step + 1, codes, reference)
        finally:
            machines.end()


def _next_attempt(machines: Machines, before: set[int]) -> tuple[float, int]:
    """Return the first step that the next attempt has written, and when. before: the ranks of this one."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if not machines.pids() & before:
                started = (machines.out / "ranks.json").stat().st_mtime  # written before the first step
                for row in machines.rows():
                    if row["time"] > started:
                        return row["time"], row["step"]
        time.sleep(0.05)
    raise SystemExit(f"the run did not go on:\n{machines.logs()}")


def _wait(machines: Machines) -> dict[str, int | None]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and any(each.poll() is None for each in machines.launchers.values()):
        time.sleep(0.1)
    return {name: each.poll() for name, each in machines.launchers.items()}


def _row(name: str, what: str, machines: Machines, seconds: float, redone: int, codes: dict, reference: dict) -> str:
    losses = {row["step"]: row["loss"] for row in machines.rows()}
    worst = max(abs(losses[step] / loss - 1) for step, loss in reference.items())
    said = "; ".join(row["message"] for row in read_incidents(machines.out))
    ends = " ".join(f"{name} {code}" for name, code in codes.items())
    return f"| {name}: {what} | {seconds:.1f} s | {max(0, redone)} | {worst:.1e} | {ends} | {said} |"


def reference_losses(steps: int, more: list[str]) -> dict[int, float]:
    """Return the losses of one process that nothing has happened to."""
    with tempfile.TemporaryDirectory() as place:
        words = [*RECIPE, f"trainer.steps={steps}", "checkpoint.every=0", "launch.nproc=1", *more, f"output_dir={place}/run"]
        subprocess.run([sys.executable, "-m", "meshloom.launch.cli", "train", *words], check=True, capture_output=True)
        rows = [json.loads(line) for line in Path(place, "run", "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row["loss"] for row in rows if "loss" in row}


def main() -> None:
    """Run the stories that were asked for, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stories", nargs="*", default=list(STORIES), help=", ".join(STORIES))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("| Story | To the next step | Steps done again | Largest relative difference of a loss | Exit codes | Said |")
    print("|---|---:|---:|---:|---|---|")
    references: dict[tuple[str, ...], dict[int, float]] = {}
    for name in arguments.stories:
        model = tuple(word for word in STORIES[name][2] if word.startswith("model."))
        if model not in references:
            references[model] = reference_losses(arguments.steps, list(model))
        print(run_story(name, arguments.ranks, arguments.steps, references[model], arguments.verbose), flush=True)


if __name__ == "__main__":
    main()
