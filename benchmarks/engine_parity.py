"""Make the parity table of docs/measurements/engines.md: both engines, every ZeRO stage, 1 to 4 processes, against float64.

    python benchmarks/engine_parity.py        # on the CPU, some minutes; the rows of NVMe need DeepSpeed's async_io built

Each cell is the largest relative difference of the losses and gradient norms of 5 steps of the tests' small decoder (shards
are uneven) from the oracle of `tests/support/parity.py`: one process, whole batches, PyTorch's own cross-entropy, clipping
and AdamW.
DeepSpeed's masters are fp32, so both engines compute in fp32 here, and the torch engine in fp64 too. The last line shows what
a wrong average looks like: the first step with the mean of the samples' means in place of the mean over tokens (rule R2).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

# Imported here so that the ranks, which are forked from this process, need not.
import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.zero.muon.original_muon
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401

from meshloom.config.problems import ConfigError
from meshloom.data.batch import IGNORED, MicroBatch
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.init import fill
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.deepspeed.optimizer import require_op
from meshloom.parallel.deepspeed.settings import DeepSpeedConfig
from meshloom.parallel.deepspeed.setup import import_deepspeed
from support.parity import Work, curves, plain_curve, sample
from support.ranks import run_ranks

PROCESSES = (1, 2, 4)
STEPS = 5
LARGE = (("dim", 192), ("ffn_dim", 512))  # shards under 1 MiB are not swapped out


def rows(folder: str) -> dict[str, dict[str, Any]]:
    """Row → the settings of `parallel`, and "model" for another than the usual."""
    hpz = DeepSpeedConfig(config={"zero_optimization": {"zero_hpz_partition_size": 2}})
    nvme = {"zero": 3, "offload": "nvme", "offload_path": folder, "model": LARGE}
    return {
        **{f"ZeRO-{zero}": {"zero": zero} for zero in range(4)},
        **{f"ZeRO-{zero}, `offload=cpu`": {"zero": zero, "offload": "cpu"} for zero in range(1, 4)},
        "ZeRO-3, `offload=cpu offload_weights=cpu`": {"zero": 3, "offload": "cpu", "offload_weights": "cpu"},
        "ZeRO-3, hpZ in groups of 2": {"zero": 3, "deepspeed": hpz},
        "wider model, ZeRO-3": {"zero": 3, "model": LARGE},
        "wider model, ZeRO-3, `offload=nvme`": nvme,
        "wider model, ZeRO-3, `offload=nvme offload_weights=nvme`": {**nvme, "offload_weights": "nvme"},
    }


def apart(work: Work, ranks: int) -> float:
    """Largest relative difference from the oracle, over losses, norms, steps and ranks."""
    expected = [value for curve in plain_curve(replace(work, parallel=ParallelConfig(zero=0))) for value in curve]
    worst = 0.0
    for found in run_ranks(ranks, curves, work):
        values = [value for curve in found for value in curve]
        worst = max(worst, *(abs(a / b - 1) for a, b in zip(values, expected, strict=True)))
    return worst


def cell(engine: str, settings: dict[str, Any], ranks: int, precision: str) -> str:
    """One figure, or a dash where this engine does not have it on so many processes."""
    only_deepspeed = {"offload_weights", "deepspeed"} & set(settings) or settings.get("offload") == "nvme"
    if (engine == "torch" and only_deepspeed) or ("deepspeed" in settings and ranks % 2):
        return "–"
    axes = dict(settings)
    model = axes.pop("model", ())
    work = Work(ParallelConfig(engine=engine, **axes), micro=1, samples=8, steps=STEPS, precision=precision, model=model)
    return f"{apart(replace(work, lr=1e-3) if model else work, ranks):.0e}"


def wrong_average() -> tuple[float, float]:
    """Return by how much the first step's loss and gradient norm are off when the samples' means are averaged."""
    work = Work()
    model = Decoder(DecoderConfig(**work.llama())).double()
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        fill(parameter.data, model.initial(name), seed=7, name=name, global_shape=shape, offsets=(0,) * len(shape))
    batch = MicroBatch.collate([sample(index) for index in range(work.samples)])
    logits = model(batch.tokens_BS, None, batch.documents)
    each = [F.cross_entropy(row, goal, ignore_index=IGNORED) for row, goal in zip(logits, batch.targets_BS, strict=True)]
    right = F.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), ignore_index=IGNORED)
    found: list[tuple[float, float]] = []
    for loss in (torch.stack(each).mean(), right):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        found.append((float(loss), float(torch.nn.utils.get_total_norm(gradients))))
    (loss, norm), (right_loss, right_norm) = found
    return abs(loss / right_loss - 1), abs(norm / right_norm - 1)


def main() -> None:
    """Print the table."""
    import_deepspeed("cpu")
    with tempfile.TemporaryDirectory() as folder:
        table = rows(folder)
        try:
            require_op("AsyncIOBuilder", "parallel.offload", "")
        except ConfigError as error:
            print(f"no row for NVMe: {error}", file=sys.stderr)
            table = {name: settings for name, settings in table.items() if settings.get("offload") != "nvme"}
        print("| | torch fp64, 1 / 2 / 4 processes | torch fp32, 1 / 2 / 4 | deepspeed fp32, 1 / 2 / 4 |\n|---|---|---|---|")
        for name, settings in table.items():
            columns = [
                " / ".join(cell(engine, settings, ranks, precision) for ranks in PROCESSES)
                for engine, precision in (("torch", "fp64"), ("torch", "fp32"), ("deepspeed", "fp32"))
            ]
            print(f"| {name} | {' | '.join('–' if set(column) <= set('– /') else column for column in columns)} |", flush=True)
    loss, norm = wrong_average()
    print(f"\na mean of means in place of the mean over tokens: loss {loss:.0e}, gradient norm {norm:.0e}")


if __name__ == "__main__":
    main()
