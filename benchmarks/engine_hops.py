"""A run that hops between engines, ZeRO stages, offloading and numbers of processes, beside one that stays where it is.

    python benchmarks/engine_hops.py outputs/hops            # on the CPU, some minutes; needs the extra [deepspeed]

torch ZeRO-3 on 4 processes → DeepSpeed ZeRO-1 on 2 → DeepSpeed ZeRO-3 with CPU offload on 4 → torch TP 2 on 2, `STEPS` steps in
each place, started as a user would, with `resume=auto`, on the quickstart's text with a smaller model in fp32. Prints, for each
place, the losses at its end of both runs, and their largest relative difference there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

STEPS = 10
RUN = [
    *("recipe=quickstart", "data.seq_len=64", "model.dim=64", "model.layers=2", "model.ffn_dim=192", "batch.samples=16"),
    *("schedule=constant", "schedule.warmup=10", "optim.lr=1e-3", "trainer.eval_every=10", "trainer.eval_samples=16"),
    *("trainer.sample_prompt=null", "checkpoint.every=10", "logging.progress=false", "resume=auto"),
]
HOPS = {
    "torch, ZeRO-3, 4 processes": (4, ["parallel.engine=torch", "parallel.zero=3"]),
    "DeepSpeed, ZeRO-1, 2 processes": (2, ["parallel.engine=deepspeed", "parallel.zero=1"]),
    "DeepSpeed, ZeRO-3, `offload=cpu`, 4 processes": (
        4,
        ["parallel.engine=deepspeed", "parallel.zero=3", "parallel.offload=cpu"],
    ),
    "torch, TP 2, 2 processes": (
        2,
        ["parallel.engine=torch", "parallel.zero=1", "parallel.offload=none", "parallel.tp=2"],
    ),
}


def train(folder: Path, steps: int, processes: int, *words: str) -> None:
    """One `meshloom train`, unless the folder has got that far. Raises where it fails."""
    if (folder / "metrics.jsonl").is_file() and max(curve(folder, "loss"), default=0) >= steps:
        return
    own = [f"output_dir={folder}", f"trainer.steps={steps}", f"launch.nproc={processes}"]
    subprocess.run([sys.executable, "-m", "meshloom.launch.cli", "train", *RUN, *own, *words], check=True)


def curve(folder: Path, key: str) -> dict[int, float]:
    """Step → number."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def main() -> None:
    """Run both and print the table."""
    output = Path(sys.argv[1])
    train(output / "stays", STEPS * len(HOPS), 1, "parallel.zero=0")
    for number, (processes, words) in enumerate(HOPS.values(), 1):
        train(output / "hops", STEPS * number, processes, *words)
    stays, hops = (curve(output / name, "loss") for name in ("stays", "hops"))
    tests = [curve(output / name, "eval_loss") for name in ("stays", "hops")]
    print("| steps | where | loss at its end, staying | hopping | largest relative difference | validation |")
    print("|---|---|---|---|---|---|")
    for number, name in enumerate(HOPS):
        steps = range(STEPS * number + 1, STEPS * (number + 1) + 1)
        apart = max(abs(hops[step] / stays[step] - 1) for step in steps)
        last = steps[-1]
        print(
            f"| {steps[0]}–{last} | {name} | {stays[last]:.6f} | {hops[last]:.6f} | {apart:.0e} "
            f"| {tests[0][last]:.5f} / {tests[1][last]:.5f} |"
        )


if __name__ == "__main__":
    main()
