"""Rows for several GPUs: the code takes every command as it stands, and a call goes on where the last one ended."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from meshloom.trainer.resolve import ResolveOptions, resolve
from support.documents import ROOT

FOLDER = ROOT / "benchmarks"


class Parsed(Exception):
    """The arguments of a script are ones that it has."""


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    """Let scripts import each other, as they do when they are run; forget them afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).parent == FOLDER:
            del sys.modules[name]


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def commands_of(gpus: int, tiny: bool) -> list[list[str]]:
    rows = module("several_rows")
    place = rows.Place(gpus, Path("out"), tiny)
    return [list(command.words) for row in rows.all_rows(place) for command in row.commands]


def script_of(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the script that a command runs and its arguments; None for one of `meshloom` and pytest."""
    at = next((at for at, word in enumerate(words) if word.startswith("benchmarks/")), None)
    return None if at is None else (Path(words[at]).stem, list(words[at + 1 :]))


def run_of(words: list[str]) -> list[str] | None:
    """Return the overrides of the run that a command starts or plans; None where it does neither."""
    if words[:2] == ["meshloom", "train"] or (words[:2] == ["meshloom", "plan"] and "--best" in words):
        return [word for word in words[2:] if not word.startswith(("cluster=", "--")) and not word.isdigit()]
    if "meshloom.launch.rank" in words:
        at = words.index("meshloom.launch.rank")
        return [*words[at + 1 :], f"launch.nproc={words[words.index('--nproc-per-node') + 1]}"]
    if (script := script_of(words)) is not None and script[0] == "beside_torchtitan":
        beside = module("beside_torchtitan")
        settings = module("arguments").read(beside.Settings(), script[1])
        command = beside.our_command(settings, Path("out"), [], profiled=bool(settings.profile))
        return command[next(at for at, word in enumerate(command) if word.startswith("recipe=")) :]
    return None


@pytest.mark.parametrize(("gpus", "tiny"), [(2, False), (8, False), (2, True)])
def test_every_run_has_a_legal_config(gpus: int, tiny: bool, scripts: None) -> None:
    runs = {tuple(run) for words in commands_of(gpus, tiny) if (run := run_of(words)) is not None}
    assert len(runs) > 25
    wrong: list[str] = []
    for run in sorted(runs):
        (count,) = {int(word.partition("=")[2]) for word in run if word.startswith("launch.nproc=")}
        assert 1 <= count <= gpus
        how = ResolveOptions(lambda _, count=count: count, resumes=False, data_elsewhere=True, builds=lambda _: False)
        wrong += [f"{' '.join(run)}: {problem}" for problem in resolve(run, how).problems if not problem.lacks]
    assert wrong == []


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_every_script_takes_its_arguments(gpus: int, scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *own: Any) -> None:
        parse(self, *own)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    found = [script for tiny in (False, True) for words in commands_of(gpus, tiny) if (script := script_of(words))]
    for name, arguments in found:
        imported = module(name)
        if hasattr(imported, "Settings"):
            module("arguments").read(imported.Settings(), arguments)
            continue
        monkeypatch.setattr("sys.argv", [name, *arguments])
        with pytest.raises(Parsed):
            imported.main()
    assert len({name for name, _ in found}) == 7


def test_tests_are_there_and_numbers_of_other_rows_have_a_row(scripts: None) -> None:
    rows = module("several_rows")
    for gpus in (2, 4, 8):
        found = rows.all_rows(rows.Place(gpus, Path("out")))
        names = [row.name for row in found]
        assert len(set(names)) == len(names)
        others = {goal.over.partition("/")[0] for row in found for goal in row.goals if "/" in goal.over}
        assert others and others <= set(names)
        files = [word for row in found for command in row.commands for word in command.words if word.startswith("tests/")]
        assert files and all((ROOT / file).exists() for file in files)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["several_gpus.py", *arguments])
    return module("several_gpus").main()


def test_a_call_goes_on_where_the_last_ended(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, runner = module("several_rows"), module("several_gpus")
    said = {"system": "meshloom", "rate": 230.0, "reserved": 30.0, "first_step": float("nan")}
    theirs = {**said, "system": "torchtitan", "rate": 200.0}
    print_both = f"print({json.dumps(said)!r}); print({json.dumps(theirs)!r})"

    def python(code: str, *before: Any) -> list[Any]:
        return [*before, rows.Command(["python", "-c", code], rows.figures.beside)]

    goals = [
        rows.Goal("over theirs", "meshloom", "torchtitan", least=1.2),
        rows.Goal("over the first's", "meshloom", "first/meshloom"),
    ]
    table = [
        rows.Row("first", "?", 1, python(print_both), goals),
        rows.Row("long", "?", 0.2, python("import time; time.sleep(60)"), goals),
        rows.Row("later", "?", 500, python(print_both), goals),
        rows.Row("silent", "?", 1, python("print('ours failed')"), goals),
        rows.Row("wrong", "?", 1, python("raise SystemExit(3)", *python(print_both))),
    ]
    monkeypatch.setattr(runner, "all_rows", lambda _: table)
    output = f"output={tmp_path}"
    assert call(monkeypatch, output, "seconds=100") == 1
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(line["row"], line["ended"]) for line in lines] == [
        ("first", "done"),
        ("long", "stopped in 0.log"),
        ("silent", "without 'meshloom' in its logs"),
        ("wrong", "failed with 3 in 1.log"),
    ]
    assert lines[0]["numbers"] == {
        "meshloom": 230.0, "meshloom GiB": 30.0, "torchtitan": 200.0, "torchtitan GiB": 30.0
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "later is left for the next call" in printed and "| **later** | ? | not run | |" in printed
    assert "| | over theirs | 1.15 | ≥ 1.2: **missed** |" in printed and "| | over the first's | 1 |  |" in printed
    assert call(monkeypatch, output, "seconds=1000") == 0
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 5
    assert call(monkeypatch, output, "only=wrong") == 1
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 6
    table[:] = [rows.Row("cut", "?", 1, python("import time; time.sleep(60)"))]
    for count in (7, 8):
        assert call(monkeypatch, output, "seconds=1.5") == 1
        assert (tmp_path / "rows.jsonl").read_text().count("\n") == count, "a row that the end of a call has cut is run again"
    with pytest.raises(SystemExit, match="no row typo"):
        call(monkeypatch, output, "only=typo")


def test_figures_are_read_from_what_benchmarks_print(scripts: None) -> None:
    figures = module("several_figures")
    assert figures.tests("…\n30 passed, 2 skipped in 88.01s\n") == {"passed": 30, "failed": 0, "skipped": 2}
    told = "| stop | 1 | … collective 3 of group 0: not joined by rank 1 |\n\n"
    told += "1 wrong or missing names; 2 of the stops ended later than"
    assert figures.faults(told) == {"wrong names": 1, "late ends": 2, "collectives": 1}
    told = "0: ZeRO-1 on 2: kill of rank 0 in data of step 9 (noticed): losses 1.5e-15 apart, exit codes [0], 12 s\n"
    assert figures.fire(told) == {"runs": 1, "apart": 1.5e-15, "noticed": 1, "struck": 0, "wrong names": 0, "hung": 0}
    told = "none: 62,169 tokens/s/GPU, median step 1.0 ms, mean +0.00 % of the\n"
    told += "  save of step 5: stall_seconds 2e-06 staging_seconds 1\n"
    assert figures.saves(told) == {"none": 62169, "none %": 0, "stall": 2e-06}
    line = "loss: 20 steps in common; at step 20: 1.0 and 1.0; relative difference over the first 10: {}, over all: {}\n"
    assert figures.apart(line.format("1e-07", "3e-05") + line.format("2e-07", "1e-05")) == {"first 10": 2e-07, "all": 3e-05}
