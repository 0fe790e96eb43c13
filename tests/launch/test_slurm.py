"""The sbatch script: valid bash, complete, and really run on two "nodes" of this machine with a fake srun and scontrol."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from meshloom.config.problems import ConfigError
from meshloom.launch import slurm

# Starts the task once per node, as srun does with --ntasks-per-node=1, and passes signals on to the tasks.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
pids=()
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    pids+=($!)
done
for name in USR1 TERM; do trap "kill -$name \\"\\${pids[@]}\\"" $name; done
code=0
for pid in "${pids[@]}"; do
    wait "$pid"; one=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; one=$?; done
    [ $one -gt $code ] && code=$one
done
exit $code
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$SCONTROL_LOG"
if [ "$1 $2" = "show hostnames" ]; then printf 'localhost\\nlocalhost\\n'; fi
"""
PATIENCE = 600.0  # seconds for what takes ten of them where nothing else runs
SMALL = [
    "recipe=quickstart",
    "data=synthetic",
    "data.seq_len=16",
    "model.vocabulary=64",
    "model.dim=16",
    "model.layers=2",
    "model.ffn_dim=32",
    "batch.samples=8",
    "batch.micro=2",
    "trainer.eval_every=0",
    "checkpoint.every=1000",
    "launch.nodes=2",
    "launch.gpus_per_node=1",
    "output_dir=run",
]


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job on a cluster of stand-ins."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost,localhost",
        "SLURM_JOB_NUM_NODES": "2",
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "OMP_NUM_THREADS": "1",
    }


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", text, re.MULTILINE))


def test_script_is_valid_bash_and_asks_for_what_the_config_says(tmp_path: Path) -> None:
    overrides = [
        "recipe=llama_1b",
        "launch.nodes=4",
        "launch.partition=gpu",
        "launch.cpus_per_task=16",
        "launch.signal_seconds=120",
        "resume=none",
        "launch.job_name='two words'",
        'trainer.sample_prompt="it\'s"',
    ]
    text = slurm.script(overrides)
    (tmp_path / "run.sbatch").write_text(text)
    subprocess.run(["bash", "-n", str(tmp_path / "run.sbatch")], check=True)
    asked = directives(text)
    assert asked["nodes"] == "4" and asked["ntasks-per-node"] == "1" and asked["gpus-per-node"] == "8"
    assert asked["signal"] == "B:USR1@120" and "requeue" in asked
    assert asked["partition"] == "gpu" and asked["cpus-per-task"] == "16" and "account" not in asked
    assert "#SBATCH --job-name='two words'" in text
    (line,) = [line for line in text.splitlines() if line.startswith("' meshloom ")]
    assert shlex.split(line[1:].rstrip("&")) == [
        "meshloom",
        *overrides,
    ]


@pytest.mark.parametrize("asked", ["resume=runs/step-00000004", "resume=auto:imported", "resume=auto", "resume=none"])
def test_the_first_start_begins_where_it_was_asked(asked: str) -> None:
    (line,) = [line for line in slurm.script(["recipe=llama_1b", asked]).splitlines() if line.startswith("' meshloom ")]
    assert shlex.split(line[1:].rstrip("&")) == ["meshloom", "recipe=llama_1b", asked]


def test_bad_config_prints_problems_and_no_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm.main(["recipe=llama_1b", "launch.nodes=5", "optim.lrr=1", "parallel.zero=9"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "optim.lrr" in said.err and "parallel.zero" in said.err


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("launch.job_name=''", "launch.job_name"),
        ("launch.job_name='a\n#SBATCH --exclusive'", "launch.job_name"),
        ("launch.job_name=llama/1b", "launch.job_name"),
        ("launch.partition=''", "launch.partition"),
        ("launch.account=' '", "launch.account"),
        ("launch.cpus_per_task=0", "launch.cpus_per_task"),
    ],
)
def test_what_sbatch_would_stumble_over_is_refused(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        slurm.script(["recipe=llama_1b", override])
    assert [problem.key for problem in caught.value.problems] == [key]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes where the cores are shared, half a minute where they are not
def test_two_nodes_train(tmp_path: Path, cluster: dict[str, str]) -> None:
    (tmp_path / "run.sbatch").write_text(slurm.script([*SMALL, "trainer.steps=3"]))
    done = subprocess.run(["bash", "run.sbatch"], cwd=tmp_path, env=cluster, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").is_file()
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes where the cores are shared, half a minute where they are not
def test_time_limit_saves_and_queues_again(tmp_path: Path, cluster: dict[str, str]) -> None:
    (tmp_path / "run.sbatch").write_text(slurm.script([*SMALL, "trainer.steps=1000000"]))
    job = subprocess.Popen(
        ["bash", "run.sbatch"],
        cwd=tmp_path,
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    try:
        while not (metrics.exists() and metrics.read_text()):
            assert job.poll() is None, "the job ended before its first step"
            assert time.monotonic() < deadline, f"no step within {PATIENCE} s"
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=PATIENCE)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, said
    assert f"scontrol requeue {cluster['SLURM_JOB_ID']}" in (tmp_path / "scontrol.log").read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))
