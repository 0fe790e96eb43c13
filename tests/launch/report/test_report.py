"""`meshloom report`: its page, its pictures, what it says of odd runs, and the live page."""

from __future__ import annotations

import json
import re
import shlex
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from meshloom.config.keys import Side
from meshloom.launch.report.collect import find_runs
from meshloom.launch.report.command import main
from meshloom.launch.report.drawings import pipeline_drawing
from meshloom.launch.report.page import make_page, render
from meshloom.launch.report.serve import LivePage, make_server
from meshloom.launch.report.tables import ABSENT, differences, flat, state
from meshloom.launch.report.tables import results as results_table
from meshloom.launch.report.winner import continue_command, find_winner, typed_run
from meshloom.launch.run_metrics import Metrics
from meshloom.trainer.schema import make_composer
from meshloom.trainer.sides import key_sides
from meshloom.trainer.typed import plain_config, typed_config
from support.run_folders import step_row, write_run


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def rows_with_everything() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        step_row(step, memory_gib=4.0, memory_reserved_gib=5.0, mfu=0.5, noise_scale=30.0) for step in range(1, 41)
    ]
    del rows[20]["loss"]
    rows.append({"step": 40, "eval_loss": 2.5, "tokens": 40_000, "validation/web/loss": 2.0, "validation/code/loss": 3.0})
    rows.append({"step": 40, "tokens": 40_000, "tasks/opposites/acc": 0.5})  # in a row of its own
    rows.append({"step": 20, "checkpoint_step": 20, "checkpoint_saved": True, "checkpoint/total_seconds": 2.0})
    return rows


def test_the_page_of_a_run_needs_no_network_and_escapes_what_was_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"kind": "death", "message": "rank 1 was killed <script>alert(1)</script>", "step": 30, "rank": 1, "time": 1030.0}
    words = ("trainer.steps=40", "parallel.pp=2", "launch.nproc=2")
    folder = write_run(tmp_path / "a run", rows_with_everything(), *words, incidents=[said])
    (folder / "experts").mkdir()
    (folder / "experts/load.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert main([str(folder)]) == 0
    assert "its pictures lie beside it" in capsys.readouterr().out
    written = folder / "report"
    page = Elements((written / "report.html").read_text())
    pictures = page.all("img")
    names = {path.stem for path in written.glob("*.svg")}
    assert names >= {f"loss_by_{axis}" for axis in ("step", "tokens", "samples", "seconds")}
    assert names >= {"lr", "batch", "grad_norm", "noise", "throughput", "mfu", "memory", "checkpoints", "validation_by_source"}
    assert names >= {"pipeline_a run", "experts_load_a run", "tasks_acc"}
    assert len(pictures) == len(names) and all(
        (each["src"] or "").startswith("data:image/svg+xml;base64,") for each in pictures
    )
    assert {path.stem for path in written.glob("*.png")} == {name for name in names if not name.startswith(("pipe", "experts"))}
    assert not page.all("script") and not page.all("link") and not page.all("a")
    assert "rank 1 was killed <script>alert(1)</script>" in page.text  # as text
    assert "finished" in page.text and "2.5000" in page.text
    assert "death" in (written / "loss_by_step.svg").read_text()
    assert "loss not finite" in (written / "loss_by_step.svg").read_text()


def sweep(folder: Path) -> Path:
    for lr, loss, steps in ((1e-3, 3.0, 4), (3e-3, 2.0, 4), (1e-2, 1.0, 2)):
        rows = [*(step_row(step) for step in range(1, steps + 1)), {"step": steps, "eval_loss": loss, "tokens": steps * 1000}]
        output = folder / f"optim.lr={lr}"
        write_run(output, rows, f"optim.lr={lr}", "trainer.steps=4", "batch.micro=2", f"output_dir='{output}'")
    return folder


def test_a_sweep_has_its_winner_and_a_command_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep(tmp_path / "sweep")
    assert main([str(folder), "--output", str(tmp_path / "told")]) == 0
    page = Elements((tmp_path / "told/report.html").read_text())
    assert "Winner: optim.lr=0.003" in page.text  # the lowest loss is of a run that is not finished
    assert "1 of 3 runs have not reached their length" in page.text
    assert (tmp_path / "told/sweep_optim.lr.svg").exists()
    line = capsys.readouterr().out.strip().splitlines()[-1]
    program, command, *words = shlex.split(line)
    assert (program, command) == ("meshloom", "train") and line.strip() in page.text
    composed = make_composer().compose(words)
    assert not composed.problems
    config = composed.config
    assert (config.trainer.steps, config.resume, config.batch.micro) == (8, "auto", 2)
    assert config.output_dir == str(folder / "optim.lr=0.003")
    runs = find_runs([folder])
    shown = {key: list(map(str, values)) for key, values in differences(runs).items()}
    results = results_table(runs, find_winner(runs), shown)
    assert results.head[:3] == ["run", "optim.lr", "state"] and "output_dir" not in results.head
    assert [row[:3] for row in results.rows] == [
        ["optim.lr=0.003", "0.003", "finished"],
        ["optim.lr=0.001", "0.001", "finished"],
        ["optim.lr=0.01", "0.01", "at 2 of 4 steps"],
    ]
    assert results.marked == 0


def test_the_command_has_every_placement_key_that_the_recipe_file_has_not(tmp_path: Path) -> None:
    words = [
        "launch.nproc=4",
        "parallel.tp=2",
        "trainer.compile=true",
        "launch.sbatch.qos=high",
        "launch.memory='64'",
    ]
    folder = write_run(tmp_path / "run", [step_row(4)], "trainer.steps=4", "checkpoint.folder='s3://a/b c'", *words)
    (run,) = find_runs([folder])
    command = continue_command(run)
    composed = make_composer().compose(shlex.split(command.line or "")[2:])
    assert not composed.problems and command.note == ""
    again, _ = typed_config(composed.config)
    before = typed_run(run)
    assert before is not None
    own, typed = (dict(flat(plain_config(each))) for each in (before, again))
    placement = [
        key for key, side in key_sides(before).items() if side is Side.PLACEMENT and key not in ("output_dir", "resume")
    ]
    kept = {key: value for key, value in own.items() if any(f"{key}.".startswith(f"{each}.") for each in placement)}
    assert kept["checkpoint.folder"] == "s3://a/b c" and kept["launch.sbatch.qos"] == "high"
    assert {key: typed.get(key) for key in kept} == kept


def test_a_run_with_stages_goes_on_with_a_longer_last_one(tmp_path: Path) -> None:
    stages = "+stages={base:{tokens:8000},long:{tokens:2000,parallel:{cp:2}}}"
    folder = write_run(tmp_path / "run", [step_row(10)], "trainer.steps=null", "trainer.tokens=10000", stages)
    line = continue_command(find_runs([folder])[0]).line or ""
    assert "trainer." not in line and "parallel." not in line
    composed = make_composer().compose(shlex.split(line)[2:])
    assert not composed.problems and composed.config.stages == {"long": {"tokens": 12000}}  # the rest is the checkpoint's


def test_a_diverged_run_does_not_win_and_a_lost_config_spoils_no_comparison(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "sweep")
    lost = {name: value for name, value in step_row(5).items() if name != "loss"}
    with (folder / "optim.lr=0.003/metrics.jsonl").open("a") as file:
        file.write(json.dumps(lost) + "\n")
    (folder / "optim.lr=0.01/config.yaml").write_text("{unclosed")
    (tmp_path / "link").symlink_to(folder)
    runs = find_runs([folder, tmp_path / "link"])  # the same ones
    states = {run.name: state(run) for run in runs}
    assert states["optim.lr=0.003"] == "finished; loss not finite" and len(runs) == 3
    winner = find_winner(runs)
    assert winner is not None and winner.name == "optim.lr=0.001"
    assert differences(runs) == {"optim.lr": [0.001, 0.003, ABSENT]}
    with (folder / "optim.lr=0.003/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "eval_loss": 1.5}) + "\n")
    assert not find_runs([folder / "optim.lr=0.003"])[0].diverged  # an evaluation has found a loss again


def test_odd_runs_are_told_and_none_is_left_out_in_silence(tmp_path: Path) -> None:
    empty = write_run(tmp_path / "runs/empty", [], "trainer.steps=4")
    diverged = write_run(tmp_path / "runs/diverged", [step_row(1), step_row(2)], "trainer.steps=4")
    lines = [json.loads(line) for line in (diverged / "metrics.jsonl").read_text().splitlines()]
    del lines[1]["loss"]
    (diverged / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    broken = write_run(tmp_path / "runs/broken", [step_row(1, loss=0.5)])
    (broken / "config.yaml").write_text("{unclosed")
    own = write_run(tmp_path / "runs/own", [step_row(4, loss=9.0)], "trainer.steps=4")
    text = (own / "config.yaml").read_text()
    text = text.replace("recipe: quickstart", "recipe: my_own")
    older = re.sub(r"^tasks:\n(  .*\n)*", "", text, flags=re.M)  # of a version without this group
    assert older != text
    (own / "config.yaml").write_text(older)
    runs = {run.name: run for run in find_runs([tmp_path / "runs"])}
    assert {name: state(run) for name, run in runs.items()} == {
        "empty": "no step yet",
        "diverged": "at 2 of 4 steps; loss not finite",
        "broken": "its config can't be read",
        "own": "finished",
    }
    assert find_winner(list(runs.values())) is runs["own"]
    assert continue_command(runs["broken"]).line is None
    assert "recipe=my_own" in (continue_command(runs["own"]).line or "")
    assert "recipe file is not known here" in continue_command(runs["own"]).note
    page = make_page([runs["empty"]], png=False)
    assert "#by-1:checked" not in render(page)
    live = render(make_page([runs["own"]], png=False), refresh=5.0)
    assert "#by-1:checked" in live.partition("<main>")[2]  # a page opened before the first step gets it with the charts
    assert page.pictures == [] and "no row of a step yet" in " ".join(page.notes)
    notes = make_page([runs["empty"], replace(runs["broken"], metrics=Metrics([]))], png=False).notes
    assert any("broken" in note and "can't be read" in note for note in notes)
    assert (empty / "report").exists() is False


def test_a_pipeline_is_drawn_for_the_processes_of_its_run_not_of_this_machine(tmp_path: Path) -> None:
    auto = write_run(tmp_path / "auto", [step_row(1)], "parallel.pp=2")
    told = write_run(tmp_path / "told", [step_row(1)], "parallel.pp=2", "launch.nproc=4")
    (first, second) = find_runs([auto, told])
    assert pipeline_drawing(first)[0] == [] and "launch.nproc is auto" in pipeline_drawing(first)[1]
    assert len(pipeline_drawing(second)[0]) == 1


def test_folders_without_runs_are_refused_all_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bare/.hydra").mkdir(parents=True)
    (tmp_path / "bare/.hydra/config.yaml").write_text("a: 1")  # Hydra's own
    assert main([str(tmp_path / "bare"), "--port", "0", str(tmp_path / "absent")]) == 2, "options stand anywhere"
    error = capsys.readouterr().err
    assert "bare: holds no run; give a run's output_dir" in error and "absent: is no folder" in error


def test_the_live_page_follows_its_run_and_answers_this_machine_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], "trainer.steps=4")
    made: list[int] = []

    def make() -> str:
        made.append(len(find_runs([folder])[0].metrics.steps))
        return f"<main>{made[-1]} steps</main>"

    with make_server(LivePage(make, lambda: [folder / "metrics.jsonl"]), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}"

            def read(path: str = "/", host: str | None = None) -> tuple[int, str]:
                request = urllib.request.Request(address + path, headers={"Host": host} if host else {})
                try:
                    with urllib.request.urlopen(request, timeout=20) as answer:
                        return answer.status, answer.read().decode()
                except urllib.error.HTTPError as error:
                    return error.code, ""

            assert read() == (200, "<main>0 steps</main>") and read()[0] == 200
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(step_row(1)) + "\n")
            assert read() == (200, "<main>1 steps</main>")
            assert made == [0, 1]  # it is made again only when there is news
            assert read("/metrics.jsonl")[0] == 404
            assert read(host="evil.example")[0] == 403
        finally:
            server.shutdown()
            thread.join()
