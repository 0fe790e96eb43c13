"""Real text on islands of which one is killed, or one comes: the loss beside runs that nothing happens to, at equal tokens.

    python benchmarks/lost_islands.py outputs/lost --input 'wiki/*.txt'

Each island is a machine: a launcher on this one, with its agent and rank (`lost_nodes.py`). Model, data and steps are those of
`slow_links.py`. Runs that were made before are only read.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from lost_nodes import HOOK, PATIENCE, Machines, kill_machine
from slow_links import METHODS, WORDS, method_words, rows

from meshloom.trainer.watch.incidents import read_incidents

NAMES = "abc"
HELD_SECONDS = 5.0
"""A step while a machine comes, which takes longer than many of these steps."""
AT = 1 / 3
"""Share of the run at which a machine is killed, or comes."""


def undisturbed(machines: Machines, steps: int) -> None:
    """nothing happens"""


def killed(machines: Machines, steps: int) -> None:
    """one is killed after a third of the steps"""
    machines.await_step(round(AT * steps))
    kill_machine(machines, machines.of_rank(len(NAMES) - 1))


def joined(machines: Machines, steps: int) -> None:
    """one more comes after a third of the steps; until it takes part, steps last longer"""
    machines.await_step(round(AT * steps))
    machines.start(NAMES[-1])
    deadline = time.monotonic() + PATIENCE
    while not any(row.get("islands/present") == len(NAMES) for row in machines.rows()):
        if time.monotonic() > deadline:
            raise SystemExit(f"no machine has joined:\n{machines.logs()}")
        time.sleep(0.2)
    (machines.folder / "hold").unlink()


STORIES: dict[str, tuple[str, Callable[[Machines, int], None]]] = {
    "undisturbed": (NAMES, undisturbed),
    "killed": (NAMES, killed),
    "never there": (NAMES[:-1], undisturbed),
    "joined": (NAMES[:-1], joined),
}
"""Name → the machines that begin, and what happens."""


def train(folder: Path, words: list[str], steps: int, name: str) -> None:
    """Run the machines of a story to the end. Raises SystemExit where one that was left alone did not end well."""
    folder.mkdir(parents=True)
    begin, story = STORIES[name]
    if story is joined:
        (folder / "injected.py").write_text(HOOK)
        (folder / "hold").touch()
        hold = f"file: {folder / 'hold'}, seconds: {HELD_SECONDS}, begin: {round(AT * steps)}"
        words = [*words, f"trainer.hooks=[{{_target_: injected.Hold, {hold}}}]"]
    machines = Machines(folder, words, ranks=1)
    try:
        for each in begin:
            machines.start(each)
        story(machines, steps)
        machines.await_step(steps)
        codes = [each.wait(120) for each in machines.launchers.values()]
        if sorted(set(codes)) not in ([0], [-9, 0]):
            raise SystemExit(f"exit codes {codes}:\n{machines.logs()}")
    finally:
        machines.end()


def present(out: Path) -> str:
    """Return the stretches of steps with one number of islands."""
    counts = rows(out, "islands/present")
    firsts = [step for step, count in counts.items() if counts.get(step - 1) != count]
    return ", ".join(f"{counts[step]:.0f} from step {step}" for step in firsts)


def main() -> None:
    """Run the stories that were not run before, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--input", required=True, help="text to train on: a path or a glob pattern")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--inner", type=int, default=10, help="steps between two outer steps")
    parser.add_argument("--methods", nargs="*", default=["local SGD", "DiLoCo"], choices=list(METHODS))
    parser.add_argument("--stories", nargs="*", default=list(STORIES), choices=list(STORIES))
    parser.add_argument("--join", type=int, default=20, help="seconds that the start waits for a machine")
    arguments, more = parser.parse_known_args()
    print("| Method | Story | Islands | Validation loss at the end | Said |")
    print("|---|---|---|---:|---|", flush=True)
    for method in arguments.methods:
        for name in arguments.stories:
            folder = (arguments.folder / f"{method}-{name}".replace(" ", "-")).absolute()
            words = [*WORDS, f"data.input='{arguments.input}'", f"trainer.steps={arguments.steps}"]
            words += [f"trainer.eval_every={arguments.steps // 10}", *method_words(method, len(NAMES), arguments.inner)]
            words += ["optim.local.quorum=1", f"launch.nodes=2:{len(NAMES)}", f"launch.join_seconds={arguments.join}"]
            # saved in the middle of rounds; no blanks in parts
            words += ["launch.check=false", "checkpoint.every=8", "batch.samples=24", *more]
            if not folder.exists():
                train(folder, words, arguments.steps, name)
            out = folder / "run"
            said = "; ".join(row["message"] for row in read_incidents(out))
            loss = list(rows(out, "eval_loss").values())[-1]
            print(f"| {method} | {name} | {present(out)} | {loss:.3f} | {said} |", flush=True)


if __name__ == "__main__":
    main()
