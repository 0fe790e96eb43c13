"""Run what README.md and docs/ tell a reader to type, each document in a fresh folder, and print what came of it.

    python benchmarks/docs_commands.py                      # every document: about 40 minutes on two cores
    python benchmarks/docs_commands.py README.md docs/evaluate.md
    python benchmarks/docs_commands.py --list               # what would be run, and why the rest would not

Commands run in the order of the page, and then its Python, all in one interpreter. `docs_commands.toml` says which are not
run, and why. Those that train do so for few steps. A document's folder holds what its reader has: the run that README.md
begins with, a few texts, and stand-ins for downloaded models. The exit code is 1 if any command ended with another code than
it should.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.documents import DOCUMENTS, shown_commands, shown_python, write_examples  # noqa: E402  # pyright: ignore[reportMissingImports]

PATIENCE = 600.0  # seconds that a command may take
SHORT = {"trainer.steps": 8, "trainer.eval_every": 4, "checkpoint.every": 4}
"""Keys that are added to a command that trains, where it does not name them."""
OWN_LENGTH = re.compile(r"stages\.|three_stages|long_context_tiny|--cfg|optim\.lrr")
"""Of commands that are short as they stand."""
STARTS = (
    "meshloom train recipe=quickstart launch.nproc=1",
    "meshloom train recipe=moe_tiny launch.nproc=1",
    "meshloom train -m recipe=quickstart optim.lr=1e-3,3e-3,1e-2 launch.nproc=1 trainer.steps=12",
    "meshloom checkpoint export outputs/quickstart Qwen3-0.6B",
    "meshloom checkpoint import Qwen3-0.6B imported",
)
"""Commands that make what the documents after README.md begin with."""
COPIES = ("run", "dense", "tuned")  # other names of that run


@dataclass(frozen=True)
class Command:
    """A command that a document shows, to be typed.

    typed  as it stands; run: what is run in its place
    code   the exit code that it should have
    why    why it is not run; None: it is
    """

    document: str
    typed: str
    run: str
    python: bool
    code: int
    why: str | None


@dataclass(frozen=True)
class Outcome:
    """The end of a command. code: None where it did not end in time; output: the last of what it said."""

    command: Command
    code: int | None
    seconds: float
    output: str

    @property
    def good(self) -> bool:
        """True if it ended as it should."""
        return self.code == self.command.code


def read_commands() -> list[Command]:
    """Return everything that the documents show, README.md first, in the order of the page."""
    table = tomllib.loads(HERE.with_suffix(".toml").read_text())
    pages: list[Path] = sorted(DOCUMENTS, key=_comes_later)
    found: list[Command] = []
    for page in pages:
        document, text = str(page.relative_to(ROOT)), page.read_text()
        found += [_command(document, typed, False, table) for typed in shown_commands(text)]
        if blocks := list(shown_python(text)):
            found.append(_command(document, "\n\n".join(blocks), True, table))
    return found


def _comes_later(page: Path) -> bool:
    return page != ROOT / "README.md"


def _command(document: str, typed: str, python: bool, table: dict[str, Any]) -> Command:
    name = f"{document}: {typed}"
    why = next((rule["why"] for rule in table["not_run"] if re.search(rule["pattern"], name)), None)
    code = next((rule["code"] for rule in table["expect"] if re.search(rule["pattern"], name)), 0)
    run = typed
    for rule in table["change"]:
        run = re.sub(rule["pattern"], rule["to"], run)
    return Command(document, typed, short_python(run) if python else short(run), python, code, why)


def short(command: str) -> str:
    """Let a command that trains take few steps."""
    if not re.search(r"(meshloom train|launch\.rank) ", command) or OWN_LENGTH.search(command):
        return command
    return " ".join([command, *(f"{key}={value}" for key, value in SHORT.items() if f"{key}=" not in command)])


def short_python(block: str) -> str:
    """Let calls of `meshloom.train` take few steps."""
    words = [f"{key}={value}" for key, value in SHORT.items() if key != "trainer.steps"]

    def call(found: re.Match[str]) -> str:
        steps = [] if '"steps"' in found[0] else [f"trainer.steps={SHORT['trainer.steps']}"]
        return found[0].replace("meshloom.train(", f"meshloom.train(*{[*steps, *words]}, ")

    return re.sub(r"meshloom\.train\(.*", call, block)


def write_texts(folder: Path) -> None:
    """Write the texts that the documents name, made of Meshloom's own pages."""
    pages = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]
    rows = [json.dumps({"text": page}) for page in pages]
    (folder / "corpus").mkdir()
    for name in ("corpus.txt", "my.txt"):
        (folder / name).write_text("\n\n".join(pages[:12]))
    (folder / "corpus" / "pages.jsonl.zst").write_bytes(gzip.compress("\n".join(rows).encode()))  # told by its first bytes
    (folder / "prompts.txt").write_text("def \nclass \n")
    answers = ({"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}. " * 40} for n in range(2000))
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, answers)))
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("pictures", "*.ipynb"))


class Reader:
    """Somebody who types what the pages say, with `meshloom` of this checkout, in folders below `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        (place / "package").mkdir()
        (place / "package" / "meshloom").symlink_to(ROOT)
        paths = [str(place / "package"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "MESHLOOM_CACHE": str(place / "cache"),
        }

    def type(self, command: Command, folder: Path) -> Outcome:
        """Run a command in a folder, and end it and its children where it takes too long."""
        words = [sys.executable, "-c", f"import meshloom\n{command.run}"] if command.python else ["bash", "-c", command.run]
        began = time.monotonic()
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                words,
                cwd=folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            try:
                code = process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                code = None
                _end(process)
            except BaseException:  # Ctrl-C does not reach the session of its own
                _end(process)
                raise
            said.seek(0)
            return Outcome(command, code, time.monotonic() - began, said.read()[-4000:])

    def first_folder(self) -> Path:
        """Make the folder that the documents after README.md begin with. Raises SystemExit where that fails."""
        folder = self.place / "begun"
        folder.mkdir()
        write_texts(folder)
        for typed in STARTS:
            ended = self.type(Command("", typed, short(typed), False, 0, None), folder)
            if not ended.good:
                raise SystemExit(f"{typed}\n{ended.output}")
        for name in COPIES:
            shutil.copytree(
                folder / "outputs" / "quickstart", folder / "outputs" / name, ignore=shutil.ignore_patterns("sweep")
            )
        return folder

    def follow(self, document: str, commands: Sequence[Command], begun: Path | None) -> list[Outcome]:
        """Type the commands of a document one after another, in a folder of its own. begun: what the folder begins with."""
        folder = self.place / document.replace("/", "_")
        if begun is None:
            folder.mkdir()
            write_texts(folder)
        else:
            shutil.copytree(begun, folder)
        write_examples((ROOT / document).read_text(), folder)
        outcomes: list[Outcome] = []
        for command in commands:
            outcomes.append(self.type(command, folder))
            print(row(outcomes[-1]), flush=True)
        shutil.rmtree(folder)
        return outcomes


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command with its descendants, those in sessions of their own too: an agent's ranks are such."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it has just ended
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()  # not one that has taken over its number: psutil compares the times of their starts
    process.wait()


def row(outcome: Outcome) -> str:
    """Return a line of the table; of a command that did not end as it should, what it said, too."""
    code = "–" if outcome.code is None else str(outcome.code)
    typed = " ".join(outcome.command.typed.split())
    line = f"{code:>4} {outcome.seconds:7.1f} s  {outcome.command.document}: {typed}"
    return line if outcome.good else f"{line}\n{outcome.output}"


def main() -> int:
    """Type what the chosen documents show. Return 0, or 1 if anything ended otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="*", help="such as docs/evaluate.md (default: all)")
    parser.add_argument("--list", action="store_true", help="only say what would be run, and why the rest would not")
    arguments = parser.parse_args()
    commands = read_commands()
    if unknown := set(arguments.documents) - {each.document for each in commands}:
        parser.error(f"no commands in {', '.join(sorted(unknown))}: name documents as README.md and docs/evaluate.md")
    commands = [each for each in commands if not arguments.documents or each.document in arguments.documents]
    if arguments.list:
        for each in commands:
            print(f"{each.document}: {each.typed}\n    {f'not run: {each.why}' if each.why else each.run}")
        return 0
    chosen = [each for each in commands if each.why is None]
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="meshloom-documents-") as place:
        reader = Reader(Path(place))
        begun: Path | None = None
        for document in dict.fromkeys(each.document for each in chosen):
            if document != "README.md" and begun is None:
                begun = reader.first_folder()
            outcomes += reader.follow(document, [each for each in chosen if each.document == document], begun)
    failed = sum(not outcome.good for outcome in outcomes)
    left = len(commands) - len(chosen)
    print(f"{len(outcomes)} run, {failed} failed, {left} not run (--list says why); {sum(o.seconds for o in outcomes):.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
