"""Measure the cost of gradient-noise statistics, and whether a changing batch size makes anything compile again.

    python benchmarks/statistics_cost.py                 # GPU: Llama 1B, 4 micro-batches of 8,192 tokens; CPU: a small model
    python benchmarks/statistics_cost.py size=small      # GPU: 100 M parameters, 4 micro-batches of 4,096 tokens

The trainer's own steps, with and without statistics in turns, in one process. A round times some steps of each between two
waits for the device; printed are medians over rounds with the least and the most. Measuring includes what a controller that
decides at every step includes: the host waits for the numbers before the next step begins. (With batch.interval=10 and no
smoothing a tenth of it is paid.) Then the batch changes at every step, and the compiled graphs are counted before and after.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time

import torch
from arguments import read
from torch._dynamo.utils import counters  # pyright: ignore[reportPrivateImportUsage]

from meshloom.config.duration import Duration, Unit
from meshloom.data.build import build_node
from meshloom.optim.batch.controller import Controller
from meshloom.optim.horizon import Horizon
from meshloom.optim.progress import Progress
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh, pick_device
from meshloom.trainer.build import build_run
from meshloom.trainer.loop import Loop
from meshloom.trainer.schema import make_composer
from meshloom.trainer.typed import typed_config

SMALL = {"dim": 768, "layers": 12, "heads": 12, "kv_heads": 12, "ffn_dim": 2048, "vocabulary": 4096, "tied": "true"}
SIZES = {
    "tiny": ["recipe=quickstart", "data=synthetic", "data.vocabulary=4096", "batch.samples=16", "batch.micro=4"],
    "small": [
        *("recipe=llama_1b", *(f"model.{key}={size}" for key, size in SMALL.items())),
        *("data.seq_len=512", "batch.samples=32", "batch.micro=8"),
    ],
    "1B": ["recipe=llama_1b", "batch.samples=4", "batch.micro=1"],
}


@dataclasses.dataclass
class Settings:
    """One measurement. size: one of SIZES; steps: of each kind in a round."""

    size: str = "1B" if torch.cuda.is_available() else "tiny"
    rounds: int = 8
    steps: int = 3
    compile: int = 1


class Switched(Controller):
    """A controller that measures when it is told to, and takes the size that it is told."""

    needs_statistics = True
    measuring = False

    def measures(self, progress: Progress) -> bool:
        """As told."""
        return self.measuring

    def next_batch(self, progress: Progress) -> int:
        """As told."""
        return self.samples


def seconds(loop: Loop, measuring: bool, steps: int) -> float:
    """Mean over so many steps."""
    assert isinstance(loop.controller, Switched)
    loop.controller.measuring = measuring
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        loop.step()
    wait()
    return (time.perf_counter() - began) / steps


def wait() -> None:
    """Until the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: list[float], digits: int) -> list[float]:
    """Median, least and most."""
    return [round(value, digits) for value in (statistics.median(values), min(values), max(values))]


def main() -> None:
    """Measure and print one JSON line."""
    gpu = torch.cuda.is_available()
    settings = read(Settings(), sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        always = ["batch=norm_test", "batch.max=64", "trainer.tokens=null", "trainer.steps=100000", "trainer.eval_every=0"]
        quiet = ["schedule=constant", "checkpoint.every=0", "logging.progress=false", "trainer.sample_prompt=null"]
        compiled = [f"trainer.compile={bool(settings.compile)}", "trainer.activation=none"]
        overrides = [*SIZES[settings.size], *always, *quiet, *compiled, f"output_dir={folder}"]
        composition = make_composer().compose(overrides)
        assert not composition.problems, composition.problems
        config, _ = typed_config(composition.config)
        data = build_node(config.data, config.seed, config.model.vocabulary)
        data.prepare()
        mesh = Mesh.connect(Layout.plan(config.parallel, 1), pick_device())
        run = build_run(config, {}, data, mesh)
        loop, samples, micro = run.loop, config.batch.start, config.batch.micro_size
        loop.controller = controller = Switched(config.batch, Horizon(Duration(100_000, Unit.STEPS), data.seq_len))
        for hook in loop.hooks:
            hook.on_run_begin(loop)
        for measuring in (False, True):
            seconds(loop, measuring, 3)
        times: dict[bool, list[float]] = {False: [], True: []}
        for at in range(settings.rounds):
            for measuring in (True, False) if at % 2 else (False, True):
                times[measuring].append(seconds(loop, measuring, settings.steps))
            print(json.dumps({"round": at, **{f"measuring={key}": value[-1] for key, value in times.items()}}), flush=True)
        ratios = [on / off - 1 for on, off in zip(times[True], times[False], strict=True)]

        graphs = counters["stats"]["unique_graphs"]
        torch._dynamo.config.error_on_recompile = True
        sizes = [micro * count for count in (4, 8, 2, 3, 1, 6)]
        for size in sizes:
            controller.samples = size
            seconds(loop, size > micro, 1)
        result = {
            **{"size": settings.size, "micro_batches": samples // micro, "rounds": settings.rounds, "steps": settings.steps},
            "without_ms": spread([1000 * value for value in times[False]], 2),
            "with_ms": spread([1000 * value for value in times[True]], 2),
            "cost_percent": spread([100 * ratio for ratio in ratios], 2),
            "batches": sizes,
            "graphs": [graphs, counters["stats"]["unique_graphs"]],
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "torch": torch.__version__,
        }
        print(json.dumps(result), flush=True)
        run.close()
        mesh.close()


if __name__ == "__main__":
    main()
