"""Real text: a pipeline's stage is lost, and its layers are rebuilt from their neighbours. What that costs in loss, over steps.

    python benchmarks/lost_layers.py outputs/layers --input 'wiki/*.txt'

One run trains undisturbed. At some of its steps the checkpoint is saved by a pipeline of four stages, and a copy of it loses
the file of one stage. A run goes on from there with `checkpoint.lost_layers=neighbours`. It is behind the undisturbed one by
as many steps as that had taken to the same validation loss. Another run goes back to the last whole checkpoint instead. Runs
that were made before are only read.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from slow_links import rows

from meshloom.trainer.watch.incidents import read_incidents

STAGES = 4
WORDS = [
    "recipe=quickstart", "data=text", "data.vocabulary=2048", "data.seq_len=128", "data.validation=0.02", "model.layers=8",
    "model.dim=96", "model.ffn_dim=256", "batch.samples=32", "batch.micro=8", "trainer.eval_samples=64", "trainer.eval_every=5",
    "trainer.sample_prompt=null", "checkpoint.keep=0", "checkpoint.every=20", "logging.progress=false",
    "launch.check=false",
]  # fmt: skip


def train(out: Path, words: list[str], until: int, nproc: int = 1) -> None:
    """Train a run up to a step, which is saved. The length of the run, and so its schedule, is among the words."""
    command = [
        sys.executable,
        "-m",
        "meshloom.launch.cli",
        "train",
        *WORDS,
        *words,
        f"output_dir={out}",
        f"launch.nproc={nproc}",
    ]
    command.append(f"trainer.hooks=[{{_target_: stop_at.StopAt, step: {until}}}]")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (out / f"checkpoints/step-{until:08d}").exists():
        raise SystemExit(f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}")


STOP_AT = '''
from meshloom.trainer.hooks.base import Hook

class StopAt(Hook):
    """Asks the run to stop after a step."""
    alone = True
    def __init__(self, step):
        self.step = step
    def on_step_end(self, loop):
        loop.stopping |= loop.progress.step == self.step
'''


def undisturbed(folder: Path, words: list[str], losses: list[int], until: int) -> Path:
    """Train the undisturbed run: on one process, but for the steps that are lost later, which a pipeline takes."""
    out = folder / "undisturbed"
    for step in losses:
        if not (out / f"checkpoints/step-{step:08d}").exists():
            train(out, [*words, "resume=auto"], step - 1)
            train(out, [*words, "resume=auto", f"parallel.pp={STAGES}"], step, STAGES)
    if not (out / f"checkpoints/step-{until:08d}").exists():
        train(out, [*words, "resume=auto"], until)
    return out


def rebuilt(folder: Path, words: list[str], source: Path, step: int, stage: int, until: int) -> Path:
    """Train on from a step that has lost a stage."""
    out = folder / f"step-{step}-stage-{stage}"
    if not (out / f"checkpoints/step-{until:08d}").exists():
        broken = folder / f"broken-{stage}" / f"step-{step:08d}"
        shutil.copytree(source / f"checkpoints/step-{step:08d}", broken, dirs_exist_ok=True)
        (broken / f"rank-{stage:05d}.safetensors").unlink(missing_ok=True)
        begun = (out / "checkpoints/LATEST").exists()  # by a call that was ended
        train(out, [*words, *(["resume=auto"] if begun else [f"resume={broken}", "checkpoint.lost_layers=neighbours"])], until)
    return out


def restored(folder: Path, words: list[str], source: Path, step: int, until: int) -> Path:
    """Train on from a whole step before the loss."""
    out = folder / f"restored-{step}"
    if not (out / f"checkpoints/step-{until:08d}").exists():
        begun = (out / "checkpoints/LATEST").exists()
        train(out, [*words, "resume=auto" if begun else f"resume={source}/checkpoints/step-{step:08d}"], until)
    return out


def steps_behind(step: int, loss: float, curve: dict[int, float]) -> float:
    """Return by how many steps a loss is behind an undisturbed curve, between whose points lines are drawn."""
    for (early, high), (late, low) in pairwise(sorted(curve.items())):
        if low <= loss:
            share = min(1.0, max(0.0, (high - loss) / (high - low)))
            return max(0.0, step - (early + share * (late - early)))
    return 0.0


def main() -> None:
    """Run what was not run before, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--input", required=True, help="text to train on: a path or a glob pattern")
    parser.add_argument("--steps", type=int, default=400, help="of the schedule; runs end after the last row of the table")
    parser.add_argument("--lost", type=int, nargs="*", default=[100, 250], help="steps at which a stage is lost")
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--after", type=int, nargs="*", default=[5, 10, 20, 40, 80, 150])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--back", type=int, default=20, help="steps from the loss back to the last whole checkpoint")
    arguments, more = parser.parse_known_args()
    top = arguments.folder.absolute()
    top.mkdir(parents=True, exist_ok=True)
    (top / "stop_at.py").write_text(STOP_AT)
    os.environ["PYTHONPATH"] = f"{top}:{os.environ.get('PYTHONPATH', '')}"
    last = max(arguments.after)
    print("| Seed | Lost at step | After so many steps | Undisturbed | Rebuilt | Steps behind | Gone back | Steps behind |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for seed in range(1, arguments.seeds + 1):
        folder = top / f"seed-{seed}"
        words = [f"data.input='{arguments.input}'", f"trainer.steps={arguments.steps}", f"seed={seed}", *more]
        source = undisturbed(folder, words, arguments.lost, max(arguments.lost) + last)
        whole = rows(source, "eval_loss")
        for lost in arguments.lost:
            out = rebuilt(folder, words, source, lost, arguments.stage, lost + last)
            back = restored(folder, words, source, lost - arguments.back, lost + last - arguments.back)
            found, again, next_loss = rows(out, "eval_loss"), rows(back, "eval_loss"), rows(out, "loss")[lost + 1]
            whole_next = rows(source, "loss")[lost + 1]
            print(f"| {seed} | {lost} | training loss of the next step | {whole_next:.3f} | {next_loss:.3f} | | | |")
            for after in arguments.after:
                step = lost + after
                losses = found[step], again[step - arguments.back]
                rebuilt_cells, again_cells = (f"{loss:.3f} | {steps_behind(step, loss, whole):.1f}" for loss in losses)
                print(f"| {seed} | {lost} | {after} | {whole[step]:.3f} | {rebuilt_cells} | {again_cells} |", flush=True)
            print(json.dumps([row["message"] for row in read_incidents(out)]))


if __name__ == "__main__":
    main()
