"""The command line: subcommands, near misses, exit codes, and Hydra's switches; every word as a user types it."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from meshloom.checkpoint.lock import FolderLock
from meshloom.config.problems import ConfigError, Problem
from meshloom.launch import cli, train
from meshloom.launch.arguments import parse
from meshloom.launch.generate import GenerateArguments
from meshloom.launch.torchrun import PreparedAgent
from meshloom.trainer.machine import RUN_LOCK
from meshloom.trainer.resolve import ResolvedRun
from meshloom.trainer.schema import OPTIONS, make_composer
from meshloom.trainer.signals import StopRequest

EARLIER = Path(__file__).parent.parent / "fixtures" / "checkpoints_2026_11.tar.xz"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder, and give the arguments back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    return tmp_path


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    """Nor does torchrun's agent, before the imports of the ranks have begun beside it."""
    program = (
        "import sys; from meshloom.launch import agent, cli; cli.main(['--help'])\n"
        "print(sorted({'torch', 'hydra'} & {*sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert all(name in out for name in cli.COMMANDS)
    assert out.splitlines()[-1] == "[]"


def test_commands_without_tensors_import_no_torch(elsewhere: Path) -> None:
    """One process runs all of them. What one imports, the others have: it must be none of these."""
    with tarfile.open(EARLIER) as archive:
        archive.extractall(elsewhere, filter="data")
    step = next(path.parent for path in sorted(elsewhere.rglob("manifest.json")))
    lines = [
        "train --help",
        "train recipe=quikstart",
        "train recipe=quickstart batch.samples=0 optim.lr=-1 parallel.zero=9 schedule.warmup=abc data.seq_len=-4",
        "train recipe=quickstart optim.lrr=1 launch.nproc=2",
        "train --steps 10",
        "train --cfg job",
        "train -m recipe=quickstart optim.lr=-1,-2",
        "plan parallel.tp=x",
        "plan --help",
        "tune optim.lrr=1",
        "tune --help",
        "slurm launch.nodes=0",
        "keys",
        "data verify path=nowhere",
        "generate --help",
        "fit --help",
        f"checkpoint list {step.parent}",
        f"checkpoint inspect {step} --arrays",
        f"checkpoint verify {step}",
        "checkpoint stats .",
    ]
    program = (
        "import sys; from meshloom.launch import cli\n"
        "for line in sys.argv[1:]:\n"
        "    try: code = cli.main(line.split())\n"
        "    except SystemExit as end: code = end.code\n"
        "    print('@', code, 'torch' in sys.modules, line)"
    )
    ran = subprocess.run([sys.executable, "-c", program, *lines], capture_output=True, text=True, check=True)
    told = [line.split(" ", 3) for line in ran.stdout.splitlines() if line.startswith("@ ")]
    assert [line for _, _, _, line in told] == lines
    assert [line for _, _, imported, line in told if imported == "True"] == []
    refused = [line for _, code, _, line in told if code == "2"]
    assert refused == [*lines[1:5], lines[6], lines[7], lines[9], lines[11], lines[13]]


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--steps", "10"], "write trainer.steps=10"),
        (["--lr=3e-4"], "write optim.lr=3e-4"),
        (["--warmpu", "5%"], "write schedule.warmup=5%"),
        (["--gpus", "4", "seed=1"], "see `meshloom keys`"),
    ],
)
def test_a_switch_that_is_a_key_tells_how_to_write_it(capsys: pytest.CaptureFixture[str], words: list[str], fix: str) -> None:
    assert cli.main(["train", *words]) == 2
    told = capsys.readouterr().err
    assert f"- {words[0].partition('=')[0]}: there is no such switch" in told and fix in told


def test_help_of_train_lists_what_there_is(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    (elsewhere / "mine" / "recipe").mkdir(parents=True)
    (elsewhere / "mine" / "recipe" / "own.yaml").write_text("")
    assert cli.main(["train", "--config-dir", "mine", "-h"]) == 0
    out = capsys.readouterr().out
    composer = make_composer()
    for group in ("recipe", *OPTIONS):
        _, begin, rest = out.partition(f"\n  {group}=")
        listed = re.split(r"\n  \w+=|\n\n", rest)[0]
        assert begin and set(composer.options(group)) <= {word.strip(" ,") for word in listed.split()}
    assert "own" in out and "meshloom train recipe=quickstart" in out


def test_every_listed_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        try:
            code = cli.main([name, "--help"])
        except SystemExit as end:  # argparse and Hydra end by themselves
            code = end.code
        assert code == 0, name
        assert capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["short", "long" * 10**5])
def test_a_reader_that_leaves_ends_a_command_without_a_traceback(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `meshloom keys | head` does. A short text is written only at the end."""

    def says(rest: list[str]) -> int:
        print(text)
        if rest:
            raise SystemExit(0)
        return 0

    monkeypatch.setattr("meshloom.launch.keys.main", says)
    for words in (["keys"], ["keys", "--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as output, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", output)
            assert cli.main(words) == 141


def test_another_broken_pipe_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(rest: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("meshloom.launch.keys.main", fails)
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as output, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", output)
        with pytest.raises(BrokenPipeError):
            cli.main(["keys"])
    os.close(reading)


def test_cfg_prints_the_config(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    assert cli.main(["train", "recipe=llama_8b", "optim.lr=0.25", "--cfg", "job"]) == 0
    out = capsys.readouterr().out
    assert "ffn_dim: 14336" in out and "lr: 0.25" in out
    assert list(elsewhere.iterdir()) == []


def test_switches_may_stand_anywhere(capsys: pytest.CaptureFixture[str], started: list[list[str]]) -> None:
    assert cli.main(["train", "seed=3", "--cfg", "job", "optim.lr=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "seed: 3" in printed and "lr: 0.5" in printed
    assert cli.main(["train", "launch.nproc=2", "-m", "optim.lr=0.1,0.2", "data=synthetic"]) == 0
    assert len(started) == 2


def test_bad_config_exits_2_naming_all_and_touching_nothing(
    capsys: pytest.CaptureFixture[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    bad = ["batch.samples=10", "batch.micro=2", "optim.lrr=1", "precision=half", "parallel.zero=7", "schedule.decay=200%"]
    assert cli.main(["train", "recipe=quickstart", *bad]) == 2
    errors = capsys.readouterr().err
    for key in ("optim.lrr", "precision", "parallel.zero", "schedule.decay"):
        assert f"- {key}: " in errors
    assert cli.main(["train", "recipe=quickstart", "batch.samples=0"]) == 2
    assert "batch.samples: 0 is not a number of samples; use 1 or more" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


def test_only_rank_0_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(["seed=x"]) == 2
    assert capsys.readouterr().err == ""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """torchrun's arguments, instead of torchrun."""
    calls: list[list[str]] = []

    class Started:
        stop_requested = False
        number = signal.SIGUSR1

        def __init__(self, arguments: list[str], workers: int | None = None) -> None:
            calls.append(list(arguments))

        def run(self, agent: PreparedAgent | None) -> int:
            return 0

    monkeypatch.setattr(train, "TorchRun", Started)
    return calls


def test_torchrun_starts_processes_with_the_same_overrides(started: list[list[str]]) -> None:
    assert cli.main(["train", "recipe=quickstart", "launch.nproc=4", "optim.lr=3e-3"]) == 0
    (arguments,) = started
    assert arguments[:3] == ["--standalone", "--nproc-per-node=4", "--max-restarts=3"]
    assert arguments[3:5] == ["-m", "meshloom.launch.rank"]
    assert arguments[5:] == ["recipe=quickstart", "launch.nproc=4", "optim.lr=3e-3", "output_dir='outputs/quickstart'"]


def test_one_process_that_may_be_restarted_needs_torchrun_too(started: list[list[str]]) -> None:
    assert cli.main(["train", "recipe=quickstart", "launch.nproc=1", "launch.max_restarts=2"]) == 0
    assert started[0][1:3] == ["--nproc-per-node=1", "--max-restarts=2"]


def test_jobs_of_a_sweep_get_folders_of_their_own(started: list[list[str]]) -> None:
    line = ["train", "-m", "recipe=quickstart", "launch.nproc=2", "optim.lr=0.001,0.003", "output_dir=there"]
    assert cli.main(line) == 0
    folders = [arguments[-1] for arguments in started]
    assert folders == [f"output_dir='there/sweep/optim.lr={lr}'" for lr in ("0.001", "0.003")]


def test_a_failed_job_fails_the_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    codes = iter([0, 7])
    monkeypatch.setattr("meshloom.trainer.run.run", lambda *_: next(codes))
    assert cli.main(["train", "-m", "recipe=quickstart", "launch.nproc=1", "seed=1,2"]) == 7
    assert "1 of 2 runs" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_that_stops_a_run_stops_its_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], started: list[list[str]], processes: int
) -> None:
    begun: list[int] = []

    def run(resolved: ResolvedRun, stop: StopRequest) -> int:
        begun.append(resolved.config.seed)
        stop.obeyed, stop.number = resolved.config.seed == 2, signal.SIGUSR1
        return 0

    monkeypatch.setattr("meshloom.trainer.run.run", run)
    monkeypatch.setattr(train.TorchRun, "stop_requested", property(lambda _: len(started) == 2))
    words = ["recipe=quickstart", f"launch.nproc={processes}"]
    assert cli.main(["train", "-m", *words, "seed=1,2,3,4"]) == 128 + signal.SIGUSR1
    assert (begun if processes == 1 else [int(call[7].removeprefix("seed=")) for call in started]) == [1, 2]
    assert "asked to stop: 2 of 4 runs of the sweep were not begun" in capsys.readouterr().err
    begun.clear()
    started.clear()
    assert cli.main(["train", "-m", *words, "seed=1,2"]) == 128 + signal.SIGUSR1  # nor has the last one come to its end
    assert cli.main(["train", *words, "seed=2"]) == 0  # a run by itself has saved, and torchrun and SLURM read its code


def test_a_sweep_tells_results_and_goes_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    def run(resolved: ResolvedRun, _: StopRequest) -> int:
        if resolved.config.seed == 1:
            raise RuntimeError("a fault of its own")
        folder = Path(resolved.config.output_dir)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5}\n{"step": 4, "eval_loss": 2.25}\n')
        return 0

    monkeypatch.setattr("meshloom.trainer.run.run", run)
    assert cli.main(["train", "-m", "recipe=quickstart", "launch.nproc=1", "seed=1,2"]) == 1
    told = capsys.readouterr()
    assert told.err.count("RuntimeError: a fault of its own") == 1 and "1 of 2 runs of the sweep failed" in told.err
    assert "Error executing job" not in told.err and "HYDRA_FULL_ERROR" not in told.err
    assert told.out.splitlines() == [
        "results of the sweep:",
        "  outputs/quickstart/sweep/seed=1  exit code 1",
        "  outputs/quickstart/sweep/seed=2  finished  step 4  loss 2.5  eval_loss 2.25",
    ]


def test_a_missing_launcher_names_its_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshloom.config.compose.Composer.options", lambda *_: ["basic"])
    assert cli.main(["train", "-m", "hydra/launcher=submitit_slurm", "recipe=quickstart", "seed=1,2"]) == 2
    told = capsys.readouterr().err
    assert "hydra/launcher: 'submitit_slurm' is not installed; pip install 'meshloom[submitit]'" in told


def test_ctrl_c_before_a_run_has_begun_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("meshloom.trainer.run.run", run)
    assert cli.main(["train", "recipe=quickstart", "launch.nproc=1"]) == 130
    assert capsys.readouterr().err == "meshloom train: interrupted\n"


def test_one_process_runs_here_with_everything_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("meshloom.trainer.run.run", lambda resolved, _: seen.append(resolved.config) or 5)
    assert cli.main(["train", "recipe=quickstart", "launch.nproc=1", "seed=9"]) == 5
    assert seen[0].seed == 9 and seen[0].output_dir == "outputs/quickstart"


def test_more_processes_than_gpus_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("launching", "machine"):
        monkeypatch.setattr(f"meshloom.trainer.{module}.visible_gpus", lambda: 2)
    assert cli.main(["train", "recipe=quickstart", "launch.nproc=4"]) == 2
    assert "launch.nproc: 4 processes for 2 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(("usable", "said"), [(1, "launch.nproc: 2 processes for 1 GPU"), (0, "PyTorch can use none of them")])
def test_gpus_that_pytorch_can_not_use_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, usable: int, said: str, started: list[list[str]]
) -> None:
    for module in ("launching", "machine"):
        monkeypatch.setattr(f"meshloom.trainer.{module}.visible_gpus", lambda: 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: usable)
    assert cli.main(["train", "recipe=quickstart"]) == 2
    assert said in capsys.readouterr().err and not started


def test_no_agent_is_started_for_a_config_with_a_problem(
    monkeypatch: pytest.MonkeyPatch, started: list[list[str]], elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []

    class Agent:
        def __init__(self, _: object) -> None:
            made.append(1)

        def dismiss(self) -> None:
            pass

    monkeypatch.setattr(train, "PreparedAgent", Agent)
    words = ["train", "recipe=quickstart", "launch.nproc=2"]
    (elsewhere / "file").write_text("")
    for bad in ("optim.lr=-1", "batch.samples=0", "optim.lrr=1", "output_dir=file"):
        assert cli.main([*words, bad]) == 2
    assert not made and "starting" not in capsys.readouterr().err
    assert cli.main(words) == 0 and made == [1] and started
    assert capsys.readouterr().err.count("starting 2 processes: they import PyTorch") == 1
    assert cli.main([*words, "launch.nodes=3", "logging.progress=false"]) == 0
    assert "starting" not in capsys.readouterr().err
    assert cli.main(["train", "-m", *words[1:], "launch.nodes=3", "seed=1,2"]) == 0
    assert capsys.readouterr().err.count("starting 2 processes on this machine: ") == 2, "one for each run of a sweep"


def test_a_folder_that_can_not_be_written_to_is_refused(
    capsys: pytest.CaptureFixture[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "file").write_text("")
    assert train.main(["output_dir=file/run", "checkpoint.folder=file"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("is not a folder") == 2 and "output_dir: " in errors and "checkpoint.folder: " in errors
    long = "a" * 300
    assert train.main([f"output_dir={long}", f"checkpoint.folder={long}"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("File name too long") == 2 and "output_dir: " in errors and "checkpoint.folder: " in errors
    assert train.main([f"output_dir={long}", "resume=auto"]) == 2
    assert "checkpoint.folder: " in capsys.readouterr().err
    assert train.main(["data=text", f"data.input={long}"]) == 2
    assert "data: aaa" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert train.main(["output_dir=new/run"]) == 2
    assert f"output_dir: '{elsewhere}' can't be written to" in capsys.readouterr().err


def test_folders_of_another_run_are_refused_before_data_prep(
    capsys: pytest.CaptureFixture[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshloom.trainer.run.run", lambda *_: 0)
    words = ["recipe=quickstart", "output_dir=run", "checkpoint.folder=kept", "launch.nproc=1"]
    for name in ("run", "kept"):
        (elsewhere / name).mkdir()
    assert train.main(words) == 0
    live = [FolderLock(elsewhere / "run", RUN_LOCK), FolderLock(elsewhere / "kept")]
    assert train.main(words) == 2
    errors = capsys.readouterr().err
    assert "output_dir: run: another run is writing into this folder" in errors
    assert "checkpoint.folder: kept: another run is saving into this folder" in errors
    assert train.main([*words, "checkpoint.every=0"]) == 2
    assert "checkpoint.folder" not in capsys.readouterr().err
    for lock in live:
        lock.release()
    assert train.main(words) == 0


def test_another_root_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config-name", "mine"]) == 2
    assert "--config-dir and recipe=" in capsys.readouterr().err


def test_a_run_on_fewer_machines_needs_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "recipe=quickstart", "launch.nodes=1:2", "checkpoint.every=0"]) == 2
    assert "launch.nodes: with checkpoint.every=0" in capsys.readouterr().err


def test_arguments_are_typed_and_all_mistakes_are_named() -> None:
    arguments = parse(GenerateArguments, ["checkpoint=a=b", "prompt=def [x] ", "tokens=3", "top_k=null", "temperature=0"])
    assert arguments == GenerateArguments(checkpoint="a=b", prompt=("def [x] ",), tokens=3, top_k=None, temperature=0.0)
    with pytest.raises(ConfigError) as caught:
        parse(GenerateArguments, ["tokns=3", "seed=x", "loose"])
    assert [problem.key for problem in caught.value.problems] == ["tokns", "seed", "loose", "checkpoint"]
    assert "did you mean tokens?" in str(caught.value)


def test_problem_found_while_running_is_reported_by_every_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> int:
        raise ConfigError([Problem("data.input", "no file of this node matches")])

    monkeypatch.setattr("meshloom.trainer.run.run", run)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["train", "recipe=quickstart"]) == 2
    assert "rank 3: 1 problem" in capsys.readouterr().err


def test_full_disk_is_one_line_and_other_faults_keep_tracebacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = OSError(errno.ENOSPC, "No space left on device", "runs/sample.txt")

    def run(*_: object) -> int:
        raise fault

    monkeypatch.setattr("meshloom.trainer.run.run", run)
    assert cli.main(["train", "recipe=quickstart", "data=synthetic"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("runs/sample.txt: No space left on device (in test_cli.py:") and " run, rank.py:" in told
    assert told.count("\n") == 1
    fault = IsADirectoryError(errno.EISDIR, "Is a directory", "runs/metrics.jsonl")
    assert cli.main(["train", "recipe=quickstart", "data=synthetic"]) == 1
    assert capsys.readouterr().err.startswith("runs/metrics.jsonl: Is a directory (in test_cli.py:")
    fault = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    with pytest.raises(ConnectionResetError):
        cli.main(["train", "recipe=quickstart", "data=synthetic"])


def test_a_missing_wandb_key_is_refused_by_the_process_that_logs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    told = Problem("logging.wandb", "there is no API key", "run `wandb login`")
    monkeypatch.setattr("meshloom.trainer.hooks.loggers.weights_and_biases.wandb_problems", lambda: [told])
    monkeypatch.setattr("meshloom.trainer.run.run", lambda *_: 0)
    assert cli.main(["train", "recipe=quickstart", "data=synthetic", "logging.wandb=true"]) == 2
    assert str(told) in capsys.readouterr().err
    assert cli.main(["train", "recipe=quickstart", "data=synthetic"]) == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "recipe=quickstart", "data=synthetic", "logging.wandb=true"]) == 0
