"""The script that runs the documents' commands: what it reads, what it leaves out and why, how it judges an end."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from meshloom.benchmarks import docs_commands
from meshloom.benchmarks.docs_commands import Command, Reader, read_commands, row, short, short_python
from support.documents import ROOT, shown_commands, shown_python, write_examples

PAGE = """# A page

    # mine/recipe/own.yaml
    recipe: own

    meshloom train recipe=quickstart \\
        launch.nproc=2     # two processes
    $ PYTHONPATH=mine meshloom plan recipe=own

    what it prints: meshloom train

| command | what for |
|---|---|
| `meshloom check` | looks |

A mention of `meshloom keys` is no command.

    import meshloom

    run = meshloom.train(recipe="quickstart")

    logits = model(tokens)

Text.

    meshloom.train("recipe=quickstart", trainer={"steps": 200})
"""


def test_commands_and_python_of_a_page_are_read_in_order(tmp_path: Path) -> None:
    assert list(shown_commands(PAGE)) == [
        "meshloom train recipe=quickstart  launch.nproc=2",
        "PYTHONPATH=mine meshloom plan recipe=own",
        "meshloom check",
    ]
    first, second = shown_python(PAGE)
    assert first.startswith("import meshloom") and first.endswith("model(tokens)")
    assert second == 'meshloom.train("recipe=quickstart", trainer={"steps": 200})'
    write_examples(PAGE, tmp_path)
    assert (tmp_path / "mine/recipe/own.yaml").read_text().strip() == "recipe: own"


def test_only_what_trains_is_made_short() -> None:
    assert short("meshloom plan recipe=own") == "meshloom plan recipe=own"
    assert short("meshloom train trainer.steps=3") == "meshloom train trainer.steps=3 trainer.eval_every=4 checkpoint.every=4"
    assert "trainer.steps=8" in short_python('meshloom.train("recipe=quickstart")')
    assert "trainer.steps=8" not in short_python('meshloom.train(trainer={"steps": 200})')


def test_every_rule_concerns_a_command_and_reasons_name_what_exists() -> None:
    table = tomllib.loads((ROOT / "benchmarks" / "docs_commands.toml").read_text())
    commands = read_commands()
    names = [f"{each.document}: {each.typed}" for each in commands]
    assert [rule for rule in table["not_run"] if not any(each.why == rule["why"] for each in commands)] == []
    assert [rule for rule in table["expect"] if not any(re.search(rule["pattern"], name) for name in names)] == []
    assert [rule for rule in table["change"] if not any(re.search(rule["pattern"], each.typed) for each in commands)] == []
    named = {file for rule in table["not_run"] for file in re.findall(r"tests/[\w/.]+", rule["why"])}
    assert named and [file for file in named if not (ROOT / file).exists()] == []
    assert sum(each.why is None for each in commands) > 90


def test_an_end_is_judged_by_its_code_and_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(tmp_path)
    refused = reader.type(Command("page.md", "refused", "echo why; exit 2", False, 2, None), tmp_path)
    failed = reader.type(Command("page.md", "failed", "echo why; exit 1", False, 0, None), tmp_path)
    monkeypatch.setattr(docs_commands, "PATIENCE", 0.2)
    hanging = reader.type(Command("page.md", "hangs", "sleep 60", False, 0, None), tmp_path)
    assert (refused.code, refused.good, row(refused).count("\n")) == (2, True, 0)
    assert (failed.code, failed.good) == (1, False) and row(failed).endswith("why\n")
    assert (hanging.code, hanging.good) == (None, False)


def test_a_document_without_commands_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["docs_commands.py", "README.md", "docs/typo.md"])
    with pytest.raises(SystemExit, match="2"):
        docs_commands.main()
    assert "no commands in docs/typo.md" in capsys.readouterr().err


@pytest.mark.parametrize("interrupted", [False, True])
def test_no_descendant_outlives_a_command(interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one in a session of its own, as an agent's ranks are; after a time-out and after Ctrl-C."""
    made, names = subprocess.Popen.wait, tmp_path / "pids"
    waits: list[int] = []

    def wait(self: subprocess.Popen[str], timeout: float | None = None) -> int:
        """The first time, wait for both processes to be there in place of the command's end."""
        waits.append(self.pid)
        if len(waits) > 1:
            return made(self, timeout)
        while not names.exists() or len(names.read_text().split()) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt if interrupted else subprocess.TimeoutExpired("command", 1)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    typed = f"setsid sleep 600 & echo $! $$ > {names}.part; mv {names}.part {names}; wait"
    reader = Reader(tmp_path)
    with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
        reader.type(Command("page.md", "hangs", typed, False, 0, None), tmp_path)
    _, alive = psutil.wait_procs(
        [psutil.Process(int(pid)) for pid in names.read_text().split() if psutil.pid_exists(int(pid))], 10
    )
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
