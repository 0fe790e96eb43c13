"""The main job as a person runs it: train on two processes, go on with one, generate; each command a process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.forked_commands import run_forked

SMALL = [
    "recipe=quickstart",
    "data=text",
    "data.input=corpus.txt",
    "data.separator='\n'",
    "data.tokenizer=bytes",
    "data.seq_len=16",
    "data.validation=0.2",
    "model.dim=16",
    "model.layers=2",
    "model.ffn_dim=32",
    "batch.samples=8",
    "batch.micro=2",
    "trainer.eval_every=2",
    "trainer.eval_samples=4",
    "trainer.sample_tokens=20",
    "checkpoint.every=2",
    "output_dir=run",
]


def meshloom(folder: Path, *words: str, forks: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command. forks: from this process, which has imported PyTorch; the first of all is started as by a person."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MESHLOOM_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "meshloom.launch.cli", *words]
    if forks:
        return run_forked(command, 280, cwd=folder, env=environment)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes where the cores are shared, half a minute where they are not
def test_train_resume_and_generate(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("".join(f"the number after {n} is {n + 1}.\n" for n in range(300)))

    first = meshloom(tmp_path, "train", *SMALL, "trainer.steps=4", "launch.nproc=2", forks=False)
    assert first.returncode == 0, first.stderr
    assert "validation loss" in first.stdout and "run" in first.stdout.splitlines()[-1]
    assert (tmp_path / "run" / "sample.txt").read_text().startswith("def ")
    assert first.stderr.count("128 tokens a step (8 samples of 16), 512 in all") == 1
    assert "parameters, vocabulary 257, fp32 on cpu, engine torch" in first.stderr
    told = re.search(r"512 in all, (\S+) epochs of (\d+) samples", first.stderr)
    assert told and float(told[1]) == pytest.approx(32 / int(told[2]), rel=0.01), first.stderr

    second = meshloom(tmp_path, "train", *SMALL, "trainer.steps=6", "resume=auto", "launch.nproc=1")
    assert second.returncode == 0, second.stderr
    assert "going on from step 4" in second.stdout
    assert "one process, 6 steps" in second.stdout and "ZeRO" not in second.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4, 6]
    wanted = {"loss", "lr", "grad_norm", "tokens", "samples", "batch_samples", "step_seconds", "tokens_per_second"}
    assert all(wanted <= row.keys() for row in rows if "loss" in row)
    folders = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith("step-"))
    assert folders[-1] == "step-00000006"

    asked = ["checkpoint=run/checkpoints/step-00000006", "prompt=the ", "tokens=10", "temperature=0"]
    third = meshloom(tmp_path, "generate", *asked)
    assert third.returncode == 0, third.stderr
    assert third.stdout.startswith("the ")
    assert meshloom(tmp_path, "generate", *asked).stdout == third.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes where the cores are shared, half a minute where they are not
def test_sweep_trains_every_job_in_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("".join(f"the number after {n} is {n + 1}.\n" for n in range(300)))
    done = meshloom(tmp_path, "train", "-m", *SMALL, "trainer.steps=2", "trainer.sample_prompt=null", "optim.lr=1e-3,3e-3")
    assert done.returncode == 0, done.stderr
    folders = list((tmp_path / "run" / "sweep").glob("optim.lr=*"))
    rates = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["lr"] for folder in folders]
    assert sorted(rates) == pytest.approx([1e-3, 3e-3])  # a warm-up of 5% of two steps is over after the first
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["sweep"]


CRASH_ONCE = """
import os
from meshloom.trainer.hooks.base import Hook

class CrashOnce(Hook):
    def on_step_end(self, loop):
        if loop.progress.step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and loop.mesh.rank == 1:
            os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes where the cores are shared, half a minute where they are not
def test_restarted_processes_go_on_from_what_the_run_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.txt").write_text("".join(f"the number after {n} is {n + 1}.\n" for n in range(300)))
    (tmp_path / "crash_once.py").write_text(CRASH_ONCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    more = ["trainer.steps=6", "trainer.hooks=[{_target_:crash_once.CrashOnce}]", "checkpoint.mode=sync", "parallel.timeout=30"]
    done = meshloom(tmp_path, "train", *SMALL, *more, "launch.nproc=2", "launch.max_restarts=1")
    assert done.returncode == 0, done.stderr
    assert "going on from step 4" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    again = meshloom(tmp_path, "train", *SMALL, *more, "launch.nproc=2", "launch.max_restarts=1")
    assert again.returncode == 0 and "going on from step 4" in again.stdout, "anew, and then from its own step 4"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
