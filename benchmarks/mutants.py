"""Break central lines one at a time, run the tests concerned, and list the faults that no test noticed.

    python benchmarks/mutants.py                    # all of mutants.toml: about half an hour on two cores
    python benchmarks/mutants.py resume tied        # those whose subject or fault contains one of these words
    python benchmarks/mutants.py --check            # only whether every line is still there, and in docs/testing.md
    python benchmarks/mutants.py --table            # the table of docs/testing.md, from the last results

A mutant is one entry of `mutants.toml`. It is killed if its tests fail, and survives if they pass. The tests must pass on
the code as it is, which is tried first. Each run happens in a scratch copy of the tree. Results are kept in a file beside
the scratch copy, so that a run that was stopped goes on. The exit code is 1 for an unexpected survivor or a missing line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".toml")
DOCUMENT = ROOT / "docs" / "testing.md"
RESULTS = Path(tempfile.gettempdir()) / "meshloom-mutants.json"
LEFT_OUT = shutil.ignore_patterns(".*", "outputs", "build", "dist", "__pycache__", "*.egg-info", "*.png")
IMPORTED = ("hydra", "hypothesis", "torch", "torch.distributed.fsdp", "torch.distributed.tensor")
"""Packages of others that are imported once, in the process that those of the tests are forked from."""
PATIENCE = 900.0  # seconds: a mutant whose tests take longer hangs, which is noticed, too


@dataclass(frozen=True)
class Mutant:
    """An entry of the table; see the head of `mutants.toml`."""

    subject: str
    what: str
    file: str
    old: str
    new: str
    tests: str
    same: str = ""

    @property
    def key(self) -> str:
        """The key of its result in the cache: any change of the entry makes it a new mutant."""
        return json.dumps([self.file, self.old, self.new, self.tests])

    def broken(self, tree: Path) -> str:
        """The text of a tree's file with the fault in it. Raises ValueError where the line is not there exactly once."""
        text = (tree / self.file).read_text() if (tree / self.file).exists() else ""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.subject}: {self.what}: {self.file} has its line {text.count(self.old)} times")
        return text.replace(self.old, self.new)


class Scratch:
    """A copy of the tree in which one file at a time is changed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.tree = folder, folder / "checkout"
        shutil.copytree(ROOT, self.tree, ignore=LEFT_OUT)
        (folder / "meshloom").symlink_to("checkout")

    def passes(self, arguments: str) -> bool:
        """Run pytest with these arguments in the copy; return whether all tests pass."""
        output = self._folder / "output.txt"
        child = os.fork()
        if not child:
            self._become_pytest(shlex.split(arguments), output)
        code = wait(child, PATIENCE)
        if code is None:
            return False
        if code > 1:  # no test was selected, or pytest itself failed
            raise RuntimeError(f"pytest {arguments}: exit code {code}\n{output.read_text()[-3000:]}")
        return code == 0

    def _become_pytest(self, arguments: list[str], output: Path) -> NoReturn:
        """Run pytest in this forked process, and end it. Torch and others are imported already; meshloom is the copy's."""
        os.setsid()  # so that the ranks that it forks can be ended with it
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(self.tree)
        os.environ["PYTHONPATH"] = str(self._folder)  # for what the tests start
        sys.path.insert(0, str(self._folder))
        code = 3
        try:
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def survives(self, mutant: Mutant) -> bool:
        """Return whether the mutant's tests pass in spite of its fault."""
        file = self.tree / mutant.file
        whole = file.read_text()
        file.write_text(mutant.broken(self.tree))
        try:
            return self.passes(mutant.tests)
        finally:
            file.write_text(whole)


def wait(child: int, patience: float) -> int | None:
    """Wait for a child to end; return its exit code. After `patience` seconds kill it with its group, and return None."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def read_table() -> list[Mutant]:
    """The entries of `mutants.toml`."""
    return [Mutant(**entry) for entry in tomllib.loads(TABLE.read_text())["mutant"]]


def missing_lines(mutants: list[Mutant]) -> list[str]:
    """List the entries whose line the code does not have exactly once."""
    found: list[str] = []
    for mutant in mutants:
        try:
            mutant.broken(ROOT)
        except ValueError as error:
            found.append(str(error))
    return found


def run(mutants: list[Mutant], results: dict[str, str]) -> None:
    """Try the mutants that have no result yet, and keep each result as it comes."""
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    for name in IMPORTED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="meshloom-mutants-") as folder:
        scratch = Scratch(Path(folder))
        sound: set[str] = set()
        for mutant in mutants:
            if mutant.key in results:
                continue
            began = time.monotonic()
            if mutant.tests not in sound and scratch.passes(mutant.tests):
                sound.add(mutant.tests)
            if mutant.tests in sound:
                results[mutant.key] = "survived" if scratch.survives(mutant) else "killed"
                RESULTS.write_text(json.dumps(results))
            verdict = results.get(mutant.key, f"pytest {mutant.tests} fails without a fault")
            print(f"{verdict}: {mutant.subject}: {mutant.what} ({time.monotonic() - began:.0f} s)", flush=True)


def table(mutants: list[Mutant], results: dict[str, str]) -> str:
    """The table of docs/testing.md."""
    rows = ["| Subject | Fault | File | Tests | Result |", "|---|---|---|---|---|"]
    for mutant in mutants:
        files = " ".join(word for word in shlex.split(mutant.tests) if word.startswith("tests"))
        result = f"the same: {mutant.same}" if mutant.same else results.get(mutant.key, "not tried")
        rows.append(f"| {mutant.subject} | {mutant.what} | `{mutant.file}` | `{files}` | {result} |")
    return "\n".join(rows)


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    everything = read_table()
    results: dict[str, str] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.table:
        print(table(everything, results))
        return 0
    wanted = [word.lower() for word in arguments.words]
    chosen = [m for m in everything if not wanted or any(word in f"{m.subject} {m.what}".lower() for word in wanted)]
    if missing := missing_lines(chosen):
        print("\n".join(missing), file=sys.stderr)
        return 1
    if arguments.check:
        document = DOCUMENT.read_text()
        if untold := [mutant.what for mutant in chosen if f"| {mutant.what} |" not in document]:
            print("not in docs/testing.md:", *untold, sep="\n  ", file=sys.stderr)
            return 1
        print(f"{len(chosen)} lines are where the table says")
        return 0
    run(chosen, results)
    survivors = [m for m in chosen if results.get(m.key) != "killed" and not m.same]
    print(f"{len(chosen)} mutants, {len(survivors)} survivors")
    for mutant in survivors:
        print(f"not killed: {mutant.subject}: {mutant.what}")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
