"""The sbatch script: valid bash, complete, and really run on two "nodes" of this machine with a fake srun and scontrol."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
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
# Runs the command behind the image, as apptainer does, without a container.
APPTAINER = """#!/bin/bash
echo "apptainer $*" >> "$SCONTROL_LOG"
while [[ "$1" != *.sif ]]; do shift; done
exec "${@:2}"
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
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("apptainer", APPTAINER)):
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


@functools.cache
def llama() -> str:
    """A script of a job, made once."""
    return slurm.script(["recipe=llama_1b"])


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
        ("launch.memory=much", "launch.memory"),
        ("launch.log=/no/such/folder/%j.out", "launch.log"),
        ("launch.runs_at_once=0", "launch.runs_at_once"),
        ("launch.sbatch.nodes=3", "launch.sbatch.nodes"),
        ("launch.sbatch.ntasks_per_node=8", "launch.sbatch.ntasks_per_node"),
        ("launch.sbatch.qos='a b\n#'", "launch.sbatch.qos"),
        ("launch.setup=[3]", "launch.setup[0]"),
        ("launch.container.image=a.sif & launch.container.runtime=docker", "launch.container.runtime"),
        ("launch.container.mounts=[/data]", "launch.container.mounts"),
        ("launch.container.image=a.sif & launch.container.mounts=['a,b']", "launch.container.mounts"),
    ],
)
def test_values_that_sbatch_can_not_take_are_refused(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        slurm.script(["recipe=llama_1b", *override.split(" & ")])
    assert [problem.key for problem in caught.value.problems] == [key]


def test_a_node_gives_what_eight_ranks_need() -> None:
    asked = directives(slurm.script(["recipe=llama_1b", "launch.nodes=2"]))
    assert asked["cpus-per-task"] == "64" and asked["mem"] == "0" and asked["output"] == "%x-%j.out"


def test_a_range_of_nodes_survives_those_that_fail() -> None:
    asked = directives(slurm.script(["recipe=llama_1b", "launch.nodes=2:4", "launch.spare_nodes=1"]))
    assert asked["nodes"] == "3-5" and asked["no-kill"] == ""
    assert "no-kill" not in directives(slurm.script(["recipe=llama_1b", "launch.nodes=2"]))


@pytest.mark.parametrize(("code", "seconds", "again"), [(75, 601, True), (137, 5, False), (76, 601, False), (78, 601, False)])
def test_only_what_may_pass_is_queued_again(
    code: int, seconds: int, again: bool, cluster: dict[str, str], tmp_path: Path
) -> None:
    """The run's own code counts, not that of a node which was lost."""
    text = llama().replace("set -uo pipefail", f"set -uo pipefail; SECONDS={seconds}")
    (tmp_path / "bin" / "srun").write_text(f'#!/bin/bash\necho {code} > "$MESHLOOM_OUTCOME"; exit 9\n')
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=cluster, capture_output=True, check=False)
    assert done.returncode == code
    assert (tmp_path / "scontrol.log").exists() == again
    assert [path.read_text() for path in tmp_path.glob(".faults-*")] == (["1\n"] if again else [])


@pytest.mark.parametrize(
    ("newest", "before", "again"), [("20", "", True), ("20", "10", True), ("20", "20", False), ("", "", True)]
)
@pytest.mark.parametrize("stopped", [True, False])
def test_a_job_is_queued_again_only_for_a_further_checkpoint(
    newest: str, before: str, again: bool, stopped: bool, cluster: dict[str, str], tmp_path: Path
) -> None:
    text = llama().replace("set -uo pipefail", "set -uo pipefail; SECONDS=601")
    text = text.replace('STOPPED=""', "STOPPED=USR1") if stopped else text
    tell = f'echo {newest} > "$MESHLOOM_NEWEST_STEP"; ' if newest else ""
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\n{tell}exit {0 if stopped else 137}\n")
    queued = tmp_path / f".queued-{cluster['SLURM_JOB_ID']}"
    if before:
        queued.write_text(f"{before}\n")
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=cluster, capture_output=True, text=True, check=False)
    assert (tmp_path / "scontrol.log").exists() == again
    assert done.returncode == (76 if not again else 0 if stopped else 137)
    assert ("the newest checkpoint is that of step 20, as when" in done.stdout) != again
    assert queued.exists() == again and not list(tmp_path.glob(".newest*"))


@pytest.mark.parametrize("before", [2, 3])
def test_a_fault_that_comes_again_ends_the_job(before: int, cluster: dict[str, str], tmp_path: Path) -> None:
    text = llama().replace("set -uo pipefail", "set -uo pipefail; SECONDS=601")
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\nexit 137\n")
    (tmp_path / f".faults-{cluster['SLURM_JOB_ID']}").write_text(f"{before}\n")
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=cluster, capture_output=True, check=False)
    assert done.returncode == 137 and (tmp_path / "scontrol.log").exists() == (before < 3)


def test_directives_of_a_site_come_beside_ours_or_in_their_place() -> None:
    site = ["qos=high", "exclusive=true", "requeue=null", "gpus_per_node=null", "gres='gpu:h100:8'", "cpus-per-gpu=12"]
    asked = directives(slurm.script(["recipe=llama_1b", "launch.nodes=2", *(f"launch.sbatch.{word}" for word in site)]))
    assert asked["qos"] == "high" and asked["exclusive"] == "" and asked["gres"] == "gpu:h100:8"
    assert asked["cpus-per-gpu"] == "12" and not {"requeue", "gpus-per-node", "cpus-per-task"} & asked.keys()


def test_setup_comes_before_the_python_that_it_finds(tmp_path: Path) -> None:
    text = slurm.script(["recipe=llama_1b", "launch.setup=['module load cuda/13','export NCCL_IB_HCA=mlx5']"])
    (tmp_path / "run.sbatch").write_text(text)
    subprocess.run(["bash", "-n", str(tmp_path / "run.sbatch")], check=True)
    lines = text.splitlines()
    assert lines.index("module load cuda/13") + 1 == lines.index("export NCCL_IB_HCA=mlx5") < lines.index("set -uo pipefail")


def test_srun_enters_the_container_with_its_folders() -> None:
    image = ["recipe=llama_1b", "launch.container.image=/img/our image.sqsh", "launch.container.mounts=['/data:/data']"]
    text = slurm.script([*image, "launch.srun_args=['--mpi=pmix']"])
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    words = shlex.split(line.removesuffix("bash -c '"))
    assert (
        words[1:5] == ["--kill-on-bad-exit=0", "--no-kill", "--wait=0", "--mpi=pmix"]
        and "--container-image=/img/our image.sqsh" in words
    )
    assert "--container-mounts=$PWD:$PWD,/data:/data" in words and "PYTHON=python3" in text.splitlines()


def test_a_sweep_is_an_array_with_the_folders_of_train_m() -> None:
    text = slurm.sweep_script(["recipe=llama_1b", "optim.lr=1e-3,3e-3", "seed=1,2", "launch.runs_at_once=2"])
    assert directives(text)["array"] == "0-3%2" and directives(text)["output"] == "%x-%A_%a.out"
    (line,) = [line for line in text.splitlines() if line.startswith("    2) RUN=(")]
    words = shlex.split(line.removeprefix("    2) RUN=(").removesuffix(") ;;"))
    assert words[:3] == ["recipe=llama_1b", "optim.lr=0.003", "seed=1"]
    assert words[-1] == "output_dir='outputs/llama_1b/sweep/optim.lr=0.003_seed=1'"


def test_switches_may_stand_between_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `meshloom train` takes them."""
    words = ["recipe=llama_1b", "-m", "optim.lr=1e-3,3e-3", "--config-dir", str(tmp_path), "launch.runs_at_once=1"]
    assert slurm.main(words) == 0
    text = capsys.readouterr().out
    assert directives(text)["array"] == "0-1%1" and f"--config-dir={tmp_path}" in text


def test_a_sweep_s_results_are_told_in_a_step_as_the_site_starts_them() -> None:
    image = ["recipe=llama_1b", "launch.container.image=a.sif", "launch.container.runtime=apptainer", "optim.lr=1e-3,3e-3"]
    text = slurm.sweep_script([*image, "launch.srun_args=['--mpi=pmix','--nodes=4']"])
    (line,) = [line for line in text.splitlines() if "sweep_results" in line]
    assert shlex.split(line)[:6] == ["srun", "--mpi=pmix", "--nodes=4", "--nodes=1", "--ntasks=1", "apptainer"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("hydra/launcher=submitit_slurm", "hydra/launcher=submitit_slurm"),
        ("launch.nodes=1,2", "launch"),
        ("optim.lrr=1,2", "optim.lrr"),
    ],
)
def test_sweeps_that_are_no_array_are_refused(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        slurm.sweep_script(["recipe=llama_1b", override])
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
    assert not (tmp_path / "scontrol.log").exists(), "the job is not queued again"


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


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes where the cores are shared, half a minute where they are not
def test_a_job_of_an_array_trains_its_run_in_a_container(tmp_path: Path, cluster: dict[str, str]) -> None:
    words = [*SMALL, "launch.nodes=1", "trainer.steps=2", "launch.setup=['export SITE=here']", "optim.lr=1e-3,3e-3"]
    words += [
        "launch.container.image=img.sif",
        "launch.container.runtime=apptainer",
        f"launch.container.python={sys.executable}",
    ]
    (tmp_path / "sweep.sbatch").write_text(slurm.sweep_script(words))
    alone = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_ARRAY_TASK_ID": "1"}
    call = {"cwd": tmp_path, "env": {**cluster, **alone}, "capture_output": True, "text": True, "timeout": PATIENCE}
    done = subprocess.run(["bash", "sweep.sbatch"], **call)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run" / "sweep" / "optim.lr=0.003"
    assert (run / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    assert "runs of the sweep in run/sweep:" in done.stdout and re.search(r"optim\.lr=0\.003  step 2  loss \d", done.stdout)
    assert "apptainer exec --nv" in (tmp_path / "scontrol.log").read_text()
