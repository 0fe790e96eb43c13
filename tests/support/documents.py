"""Contents of the documents: command lines, Python, and files of a user's own."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
SHELL = re.compile(r"(?:\w+=\S+ )*(?:meshloom|torchrun|python|make|pip|sbatch|\.) \S.*")
PYTHON = re.compile(r"^(?:\w.* = )?(?:meshloom\.\w+|model)\(", re.M)


def shown_commands(text: str) -> Iterator[str]:
    """Yield what a document shows to be typed into a shell: lines of indented blocks, and the first cells of tables."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        shown = re.fullmatch(r"    (?:\$ )?(\S.*)|\| `(meshloom [^`]+)` \|.*", line)
        typed = (shown[1] or shown[2]) if shown else ""
        if SHELL.fullmatch(typed):
            yield re.sub(r"\s{2,}#.*", "", typed)


def shown_python(text: str) -> Iterator[str]:
    """Yield the indented blocks of a document that call Meshloom, or a model that it has loaded, from Python."""
    for found in re.finditer(r"(?:^    .*\n(?:[ \t]*\n(?=    ))*)+", text + "\n", re.M):
        block = textwrap.dedent(found[0]).strip("\n")
        if PYTHON.search(block):
            yield block


def write_examples(text: str, folder: Path) -> None:
    """Write the files that a document shows in full: blocks that begin with a comment of their path."""
    lines = [*text.splitlines(), "end"]
    for first, line in enumerate(lines):
        if found := re.fullmatch(r"    # ((?:mine|site)/\S+)", line):
            rest = lines[first + 1 :]
            other = re.compile(r"\S| {1,3}\S|    # (mine|site)/|    (\S+=\S+ )?meshloom ")  # text, another file, a command
            ends = next(at for at, one in enumerate(rest) if other.match(one))
            (folder / found[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / found[1]).write_text(textwrap.dedent("\n".join(rest[:ends])))
