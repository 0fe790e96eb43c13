"""Metrics on disk, on screen, in TensorBoard and wandb; and what a resume does to each."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from meshloom.config.duration import Duration, Unit
from meshloom.config.problems import ConfigError
from meshloom.optim.horizon import Horizon
from meshloom.optim.progress import Progress
from meshloom.parallel.layout import Layout
from meshloom.trainer.hooks.loggers.config import LoggingConfig
from meshloom.trainer.hooks.loggers.defaults import default_loggers
from meshloom.trainer.hooks.loggers.metrics_file import MetricsFile
from meshloom.trainer.hooks.loggers.progress_line import PatientConsole, ProgressLine
from meshloom.trainer.hooks.loggers.tensorboard import TensorBoard
from meshloom.trainer.hooks.loggers.weights_and_biases import WandB, wandb_problems


def loop_at(step: int, folder: Path, total: int = 10) -> Any:
    return SimpleNamespace(
        progress=Progress(step, 4 * step, 64 * step, 4),
        horizon=Horizon(Duration(total, Unit.STEPS), 16, 4),
        mesh=SimpleNamespace(layout=Layout()),
        output_dir=folder,
        finished=step >= total,
        stopping=False,
    )


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 8.0 - step, "lr": 1e-3, "tokens": 64 * step, "samples": 4 * step, "tokens_per_second": 100.0}


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, first: int, last: int, every: int = 1) -> None:
    hook = MetricsFile(path, every)
    hook.on_run_accepted(loop_at(first - 1, path.parent))
    for step in range(first, last + 1):
        hook.on_metrics(loop_at(step, path.parent), row(step))
    hook.on_evaluate(loop_at(last, path.parent), {"step": last, "eval_loss": 2.0, "tokens": 64 * last})
    hook.close()


def test_metrics_file_drops_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 5)
    with path.open("ab") as file:
        file.write(b'{"step": 6, "lo\x00\xff\n\x80')  # cut short by a crash, and what the disk held before
    write(path, 4, 6)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6, 6]
    assert json.loads(path.read_text().splitlines()[-1])["eval_loss"] == 2.0


def test_the_last_step_has_a_row_and_every_row_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the run's end, and where it is asked to stop. A step's row comes when the loop may be a step ahead."""
    monkeypatch.setattr("time.time", lambda: 1234.56789)
    hook = MetricsFile(tmp_path / "metrics.jsonl", every=4)
    hook.on_run_accepted(loop_at(0, tmp_path))
    for step in (5, 6):
        hook.on_metrics(loop_at(step + 1, tmp_path), row(step))
    stopped = loop_at(6, tmp_path)
    stopped.stopping = True
    hook.on_metrics(stopped, row(6))
    hook.on_metrics(loop_at(10, tmp_path), row(9))
    hook.on_metrics(loop_at(10, tmp_path), row(10))
    hook.close()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(one["step"], one["time"]) for one in found] == [(6, 1234.568), (10, 1234.568)]


def test_a_run_from_the_beginning_starts_the_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 5)
    write(path, 1, 2)
    assert steps_in(path) == [1, 2, 2]


def test_every_thins_the_steps_but_not_the_evaluations(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 7, every=3)
    assert steps_in(path) == [1, 3, 6, 7]


class Disk:
    """Stands for `os.write` on a disk with room for so many bytes more; what does not fit is cut, as a disk does it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: float = math.inf
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, descriptor: int, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self._write(descriptor, data[: int(min(self.room, len(data)))])
        self.room -= count
        return count


def test_a_full_disk_costs_no_row_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, path = Disk(monkeypatch), tmp_path / "metrics.jsonl"
    hook = MetricsFile(path, 1)
    hook.on_run_accepted(loop_at(0, tmp_path))
    hook.on_metrics(loop_at(1, tmp_path), row(1))
    assert not hook.waits_for_rows and not hook.state_dict()
    disk.room = 20
    for step in (2, 3):
        hook.on_metrics(loop_at(step, tmp_path), row(step))
    assert steps_in(path) == [1], "a line that did not fit is taken back"
    assert hook.waits_for_rows, "a checkpoint saved now has to carry the newest row too"
    disk.room = math.inf
    hook.on_metrics(loop_at(4, tmp_path), row(4))
    assert steps_in(path) == [1, 2, 3, 4]
    hook.on_run_end(loop_at(4, tmp_path), tmp_path)
    hook.close()
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"], "said once, and once that it is over"
    assert "No space left on device" in caplog.text


def with_two_rows_waiting(disk: Disk, path: Path) -> MetricsFile:
    """A file that has the first row, and no room for the second and third."""
    first = MetricsFile(path, 1)
    first.on_run_accepted(loop_at(0, path.parent))
    first.on_metrics(loop_at(1, path.parent), row(1))
    disk.room = 0
    for step in (2, 3):
        first.on_metrics(loop_at(step, path.parent), row(step))
    return first


def goes_on(path: Path, state: dict[str, Any]) -> None:
    """The fourth step of a run that goes on from a checkpoint of the third with this state."""
    second = MetricsFile(path, 1)
    second.load_state_dict(state)
    second.on_run_accepted(loop_at(3, path.parent))
    second.on_metrics(loop_at(4, path.parent), row(4))
    second.close()


def test_rows_that_no_disk_took_go_on_with_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, path = Disk(monkeypatch), tmp_path / "metrics.jsonl"
    first = with_two_rows_waiting(disk, path)
    with pytest.raises(OSError, match="2 rows could not be written: No space left on device"):
        first.on_run_end(loop_at(3, tmp_path), tmp_path)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    disk.room = math.inf
    goes_on(path, state)
    assert steps_in(path) == [1, 2, 3, 4]


def test_rows_logged_after_the_checkpoint_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, path = Disk(monkeypatch), tmp_path / "metrics.jsonl"
    first = with_two_rows_waiting(disk, path)
    state = json.loads(json.dumps(first.state_dict()))
    disk.room = math.inf
    first.on_metrics(loop_at(4, tmp_path), row(4))
    first.close()  # killed here: the checkpoint of step 3 is the last
    assert steps_in(path) == [1, 2, 3, 4]
    goes_on(path, state)
    assert steps_in(path) == [1, 2, 3, 4]


def test_tensorboard_ends_without_the_run_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    before = set(threading.enumerate())
    hook = TensorBoard(tmp_path / "tensorboard", 1)
    hook.on_run_accepted(loop_at(0, tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hook._writer, "add_scalar", full)
    for step in (1, 2):
        hook.on_metrics(loop_at(step, tmp_path), row(step))
    hook.close()
    assert caplog.text.count("TensorBoard gets no more of this run") == 1
    assert set(threading.enumerate()) <= before, "the writer's thread has ended, too"


def test_progress_line_says_where_the_run_is(tmp_path: Path) -> None:
    out = io.StringIO()
    hook = ProgressLine(Console(file=out, width=200))
    hook.on_run_begin(loop_at(0, tmp_path))
    hook.on_metrics(loop_at(1, tmp_path), {**row(1), "mfu": 0.415})
    hook.on_metrics(loop_at(2, tmp_path), row(2))  # too soon for another line
    hook.on_evaluate(loop_at(10, tmp_path), {"step": 10, "eval_loss": 3.25})
    hook.on_metrics(loop_at(10, tmp_path), row(10))
    hook.on_run_end(loop_at(10, tmp_path), tmp_path)
    text = out.getvalue()
    assert "step 1  10%  loss 7.0000  lr 1.00e-03  100 tokens/s  MFU 41.5%  ETA" in text
    assert "step 2 " not in text
    assert "step 10: validation loss 3.2500" in text
    assert "ETA 0:00:00" in text
    assert str(tmp_path) in text.splitlines()[-1] and "validation loss 3.2500" in text.splitlines()[-1]


def test_a_folder_that_looks_like_markup_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    hook = ProgressLine()
    for folder in (Path("m[/b]"), Path("[red]m")):
        hook.on_run_begin(loop_at(0, folder))
        hook.on_run_end(loop_at(10, folder), folder)
        assert capsys.readouterr().out.count(str(folder)) == 2


@pytest.mark.parametrize(("step", "says"), [(0, None), (4, "going on from step 4"), (12, "nothing is left to do: ")])
def test_progress_line_says_from_where(tmp_path: Path, step: int, says: str | None) -> None:
    out = io.StringIO()
    ProgressLine(Console(file=out, width=200)).on_run_begin(loop_at(step, tmp_path))
    assert [line for line in out.getvalue().splitlines()[1:] if says is None or says not in line] == []
    assert len(out.getvalue().splitlines()) == (1 if says is None else 2)


def test_progress_line_on_a_terminal_stays_in_place(tmp_path: Path) -> None:
    out = io.StringIO()
    hook = ProgressLine(Console(file=out, width=120, force_terminal=True))
    hook.on_run_begin(loop_at(0, tmp_path))
    for step in (1, 2):
        hook.on_metrics(loop_at(step, tmp_path), row(step))
    hook.close()
    hook.close()
    assert "step 2" in out.getvalue()


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    hook = TensorBoard(tmp_path / "tensorboard", 1)
    hook.on_run_accepted(loop_at(0, tmp_path))
    for step in (1, 2, 3):
        hook.on_metrics(loop_at(step, tmp_path), row(step))
    hook.on_evaluate(loop_at(3, tmp_path), {"step": 3, "eval_loss": 2.5})
    hook.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 7.0), (2, 6.0), (3, 5.0)]
    assert events.Scalars("eval_loss")[0].value == 2.5


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    calls: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append, finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **settings: calls.append(settings) or run)
    first = WandB(LoggingConfig(), tmp_path, OmegaConf.create({"recipe": "r", "seed": 1}))
    first.on_run_begin(loop_at(0, tmp_path))
    first.on_metrics(loop_at(1, tmp_path), row(1))
    first.close()
    second = WandB(LoggingConfig(), tmp_path, OmegaConf.create({"recipe": "r", "seed": 1}))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.on_run_begin(loop_at(1, tmp_path))
    assert calls[0]["id"] == calls[1]["id"] and calls[1]["resume"] == "allow"
    assert calls[0]["config"] == {"recipe": "r", "seed": 1}
    assert logged == [row(1)]


def test_wandb_that_can_not_begin_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def fail(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", fail)
    hook = WandB(LoggingConfig(), tmp_path, OmegaConf.create({"recipe": "r"}))
    with pytest.raises(ConfigError, match=r"logging\.wandb: can't begin: No API key configured\.; .*WANDB_MODE=offline"):
        hook.on_run_begin(loop_at(0, tmp_path))
    hook.close()


@pytest.fixture
def no_wandb_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment and a home in which the library finds nothing. Returns the working folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said() -> list[str]:
    return [str(problem) for problem in wandb_problems()]


def test_a_missing_wandb_key_is_told_before_the_run(no_wandb_key: Path) -> None:
    assert said() == [
        "logging.wandb: there is no API key of Weights & Biases; "
        "run `wandb login`, or set WANDB_MODE=offline, or logging.wandb=false"
    ]


@pytest.mark.parametrize(
    ("variables", "files"),
    [
        ({"WANDB_API_KEY": "k" * 40}, {}),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, {}),
        ({"WANDB_MODE": "offline"}, {}),
        ({"WANDB_MODE": "disabled"}, {}),
        ({}, {"netrc": "machine api.wandb.ai login user password k"}),
        ({"WANDB_BASE_URL": "https://metrics.example.org"}, {"netrc": "machine metrics.example.org login user password k"}),
        ({}, {"wandb/settings": "[default]\nmode = offline\n"}),
        ({}, {"config/settings": "[default]\nmode = offline\n"}),
        ({}, {"config/settings": "[default]\napi_key = k\n"}),
    ],
)
def test_a_wandb_run_that_can_begin_is_not_refused(
    no_wandb_key: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], files: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (no_wandb_key / name).parent.mkdir(exist_ok=True)
        (no_wandb_key / name).write_text(text)
    assert said() == []


def test_a_key_of_another_server_and_a_misspelt_mode_are_refused(no_wandb_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (no_wandb_key / "netrc").write_text("machine example.com login user password k")
    assert "no API key" in said()[0]
    monkeypatch.setenv("WANDB_MODE", "ofline")
    assert said() == ["logging.wandb: WANDB_MODE=ofline is no mode; use online, offline or disabled"]


def test_a_variable_that_wandb_does_not_read_helps_nobody(no_wandb_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert "no API key" in said()[0]


def test_nobody_reading_the_progress_line_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # not of pytest's own output

    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    for terminal in (False, True):
        hook = ProgressLine(PatientConsole(file=Closed(), width=200, force_terminal=terminal))
        hook.on_run_begin(loop_at(0, tmp_path))
        hook.on_metrics(loop_at(1, tmp_path), row(1))
        hook.on_evaluate(loop_at(1, tmp_path), {"step": 1, "eval_loss": 2.0})
        hook.on_run_end(loop_at(1, tmp_path), tmp_path)
        hook.close()


def test_logging_config_chooses_the_hooks(tmp_path: Path) -> None:
    kinds = [type(hook) for hook in default_loggers(LoggingConfig(progress=False), tmp_path, {"recipe": "tiny"})]
    assert kinds == [MetricsFile]
    config = LoggingConfig(tensorboard=True, wandb=True)
    kinds = [type(hook) for hook in default_loggers(config, tmp_path, {"recipe": "tiny"})]
    assert kinds == [MetricsFile, ProgressLine, TensorBoard, WandB]


def test_a_logger_that_is_not_installed_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = LoggingConfig(wandb=True, tensorboard=True)
    assert [problem.key for problem in config.problems()] == ["logging.wandb", "logging.tensorboard"]
    assert LoggingConfig().problems() == []
