"""Sweeps by Hydra's submitit launcher: as processes of this machine, and as a SLURM array on a cluster of stand-ins."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from meshloom.launch.exit_codes import DIVERGED

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pip install 'meshloom[submitit]'")

SMALL = [
    *("recipe=quickstart", "data=synthetic", "data.seq_len=16", "batch.samples=8", "batch.micro=2", "trainer.steps=3"),
    *("model.vocabulary=64", "model.dim=16", "model.layers=1", "model.heads=2", "model.kv_heads=1", "model.ffn_dim=32"),
    *("trainer.eval_every=0", "checkpoint.every=0", "trainer.sample_prompt=null", "logging.progress=false"),
]

# Takes an array job as sbatch does: says its number, and runs each task when srun's turn comes, in the background, for the
# submitter puts the tasks' pickles where they are looked for only once it knows the number.
SBATCH = """#!/bin/bash
cp "$1" "$STAND_IN/script.sh"
array=$(sed -n 's/^#SBATCH --array=\\([0-9]*\\)-\\([0-9]*\\).*/\\1 \\2/p' "$1")
for task in $(seq $array); do
    SLURM_JOB_ID=77 SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1 SLURM_NODEID=0 \\
        SLURM_PROCID=0 SLURM_LOCALID=0 bash "$1" < /dev/null > "$STAND_IN/task-$task.log" 2>&1 &
done
echo "Submitted batch job 77"
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do
    case "$1" in --output|--error) shift;; esac
    shift
done
exec "$@"
"""
SACCT = "#!/bin/bash\necho 'JobID|State|NodeList'\n"


def sweep(folder: Path, launcher: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meshloom.launch.train", "-m", f"hydra/launcher={launcher}", *SMALL, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command.append(f"output_dir={folder}/run")
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def finished_steps(folder: Path, job: str) -> int:
    return len((folder / "run" / "sweep" / job / "metrics.jsonl").read_text().splitlines())


def test_jobs_of_their_own_on_this_machine_and_a_failure_is_told(tmp_path: Path) -> None:
    """The second run diverges: the first is there, and the command says which failed and fails."""
    done = sweep(tmp_path, "submitit_local", "optim.lr=1e-3,1e30", "trainer.max_grad_norm=null")
    assert finished_steps(tmp_path, "optim.lr=0.001") == 3
    assert done.returncode == DIVERGED
    assert re.search(r"the run in \S*/sweep/optim\.lr=1e\+30 ended with exit code 77", done.stderr), done.stderr
    sent = re.findall(r"^job (\S+): .*optim\.lr=(\S+) .*; log (\S+), errors (\S+)$", done.stderr, re.MULTILINE)
    assert [lr for _, lr, _, _ in sent] == ["0.001", "1e+30"] and all(Path(log).is_file() for _, _, log, _ in sent)
    assert re.search(r"sweep/optim\.lr=0\.001  finished  step 3  loss \d", done.stdout), done.stdout
    assert "Error executing job" not in done.stderr


def test_a_slurm_array(tmp_path: Path) -> None:
    """The script asks SLURM for what the config says, and its tasks train."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    asked = ["hydra.launcher.partition=gpus", "hydra.launcher.gpus_per_node=8", "hydra.launcher.timeout_min=90"]
    path = f"{tools}:{os.environ['PATH']}"
    done = sweep(tmp_path, "submitit_slurm", *asked, "optim.lr=1e-3,3e-3", PATH=path, STAND_IN=str(tmp_path))
    assert done.returncode == 0, done.stderr
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", (tmp_path / "script.sh").read_text(), re.MULTILINE))
    assert directives["array"].startswith("0-1") and directives["ntasks-per-node"] == "1"
    assert (directives["partition"], directives["gpus-per-node"], directives["time"]) == ("gpus", "8", "90")
    assert [finished_steps(tmp_path, f"optim.lr={lr}") for lr in ("0.001", "0.003")] == [3, 3]
