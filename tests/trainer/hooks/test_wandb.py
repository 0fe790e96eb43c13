"""wandb beside a run: it never ends one, never repeats a step, and is called as its own variables say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshloom.checkpoint.restore import read_state
from meshloom.config.problems import ConfigError
from meshloom.trainer.hooks.loggers.config import LoggingConfig
from meshloom.trainer.hooks.loggers.weights_and_biases import WandB
from support.run_hooks import Refuse
from support.tiny_run import body

wandb = pytest.importorskip("wandb")
WORDS = ["trainer.eval_every=0", "checkpoint.every=1"]


class Server:
    """Stands for the library: keeps what it is called with. `dies_at`: the step from which its helper is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.dies_at = 99
        self.refuses = False
        monkeypatch.setattr(wandb, "init", self.init)
        monkeypatch.setenv("WANDB_MODE", "offline")
        for name in ("RUN_ID", "DIR", "NAME", "RUN_GROUP", "PROJECT"):
            monkeypatch.delenv(f"WANDB_{name}", raising=False)

    def init(self, **settings: Any) -> Any:
        if self.refuses:
            raise wandb.errors.UsageError("No network.")
        self.calls.append(settings)
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=self.log, finish=self.finish)

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] >= self.dies_at:
            raise ConnectionResetError("Connection lost")  # as the library does once its helper was killed
        self.rows.append(row)

    def finish(self) -> None:
        if self.dies_at < 99:
            raise ConnectionResetError("Connection lost")

    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows if "loss" in row]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def train(folder: Path, steps: int, *words: str) -> None:
    assert body(0, 1, [f"output_dir={folder}", f"trainer.steps={steps}", *WORDS, "logging.wandb=true", *words]) == 0


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_a_killed_helper_costs_the_rows_and_not_the_run(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.dies_at = 3
    train(tmp_path, 5)
    assert server.steps() == [1, 2]
    assert [json.loads(line)["step"] for line in lines(tmp_path) if "grad_norm" in line] == [1, 2, 3, 4, 5]
    assert (tmp_path / "checkpoints/step-00000005").is_dir()
    assert caplog.text.count("wandb gets no more of this run: ConnectionResetError: Connection lost") == 1


@pytest.mark.parametrize("who", ["wandb", "a hook"])
def test_a_run_refused_at_its_start_touches_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    train(tmp_path, 3)

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}

    before = contents()
    words = [] if who == "wandb" else ["trainer.hooks=[{_target_:support.run_hooks.Refuse,rank:0,config:true}]"]
    server.refuses = not words
    with pytest.raises(ConfigError):
        train(tmp_path, 4, "seed=2", *words)
    assert contents() == before
    assert Refuse.alone


def test_a_segment_without_it_does_not_lose_the_run(tmp_path: Path, server: Server) -> None:
    train(tmp_path, 2)
    train(tmp_path, 3, "resume=auto", "logging.wandb=false")
    train(tmp_path, 4, "resume=auto", "logging.wandb=true")
    first, second = (call["id"] for call in server.calls)
    assert first == second
    assert read_state(tmp_path / "checkpoints")["hooks"]["WandB"] == {"id": first}


def test_steps_that_are_taken_again_are_not_sent_again(tmp_path: Path, server: Server) -> None:
    train(tmp_path, 4)
    train(tmp_path, 6, f"resume={tmp_path}/checkpoints/step-00000002")
    assert server.steps() == [1, 2, 3, 4, 5, 6]
    assert [json.loads(line)["step"] for line in lines(tmp_path) if "grad_norm" in line] == [1, 2, 3, 4, 5, 6]
    train(tmp_path, 2)  # another run in the folder
    assert server.steps() == [1, 2, 3, 4, 5, 6, 1, 2]
    assert server.calls[2]["id"] != server.calls[1]["id"]


def begun(server: Server, folder: Path, **logging: Any) -> dict[str, Any]:
    hook = WandB(LoggingConfig(**logging), folder, {"recipe": "tiny"})
    hook.on_run_begin(SimpleNamespace())  # type: ignore[arg-type]
    return server.calls[-1]


def test_its_own_variables_come_first(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    call = begun(server, tmp_path)
    assert (call["project"], call["name"], call["dir"]) == ("meshloom", "tiny", str(tmp_path))
    named = {"id": "RUN_ID", "dir": "DIR", "name": "NAME", "project": "PROJECT", "group": "RUN_GROUP", "entity": "ENTITY"}
    for variable in named.values():
        monkeypatch.setenv(f"WANDB_{variable}", f"my-{variable}")
    call = begun(server, tmp_path / "sweep/a=1")
    assert {key: call[key] for key in named} == {key: f"my-{variable}" for key, variable in named.items()}


def test_keys_of_the_config_come_before_variables(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = {"project": "p", "entity": "e", "name": "n", "group": "g"}
    for variable in ("PROJECT", "ENTITY", "NAME", "RUN_GROUP"):
        monkeypatch.setenv(f"WANDB_{variable}", "mine")
    call = begun(server, tmp_path, **typed, tags=["a", "b"])
    assert {key: call[key] for key in typed} == typed and call["tags"] == ["a", "b"]


def test_jobs_of_a_sweep_have_names_and_a_group(tmp_path: Path, server: Server) -> None:
    calls = [begun(server, tmp_path / "outputs/tiny/sweep" / job) for job in ("lr=1", "lr=2")]
    assert [call["name"] for call in calls] == ["tiny lr=1", "tiny lr=2"]
    assert [call["group"] for call in calls] == ["tiny", "tiny"]
