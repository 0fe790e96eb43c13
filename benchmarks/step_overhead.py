"""What the trainer costs: seconds of its step over those of a bare PyTorch loop on the same model, data and optimizer.

    python benchmarks/step_overhead.py                              # GPU: Llama 1B, 4 × 8,192 tokens; CPU: a small model
    python benchmarks/step_overhead.py rounds=9 steps=10

The bare loop is what a person would write by hand for one device: the plain module, autocast where the precision is bf16,
`torch.optim.AdamW`, `clip_grad_norm_`. Both take turns in one process; the printed ratio is that of the medians over
rounds, with the least and the most of the rounds' own ratios.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from meshloom.config.compose import Composer
from meshloom.data.batch import GlobalBatch
from meshloom.models.init import fill
from meshloom.models.llama import Llama
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh, pick_device
from meshloom.trainer.build import Parts, Run, build_data, build_model, build_run

SMALL = ["recipe=quickstart", "data=synthetic", "data.vocabulary=4096", "batch.samples=32", "batch.micro=8", "precision=fp32"]
LARGE = ["recipe=llama_1b", "batch.samples=4", "batch.micro=4", "trainer.activation=none", "trainer.compile=true"]


def trainer_run(overrides: list[str], folder: str) -> tuple[Run, Llama]:
    """A run of the trainer, and a second model of the same shape for the bare loop."""
    always = ["trainer.tokens=null", "trainer.steps=100000", "trainer.eval_every=0", "checkpoint.every=0"]
    quiet = ["trainer.sample_prompt=null", "logging.progress=false", f"output_dir={folder}"]
    composition = Composer().compose([*overrides, *always, *quiet])
    assert not composition.problems, composition.problems
    config = composition.config
    data = build_data(config)
    data.prepare()
    mesh = Mesh.connect(Layout.plan(Parts.of(config).parallel, 1), pick_device())
    return build_run(config, data, mesh), build_model(config, data.vocabulary)


def bare_loop(model: Llama, run: Run, compile_blocks: bool, half: bool) -> Callable[[], None]:
    """The step of a hand-written loop. Draws its data from the run's own loader settings."""
    device = run.loop.mesh.device
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        fill(parameter.data, model.initial(name), seed=1, name=name, global_shape=shape, offsets=(0,) * len(shape))
    if compile_blocks:
        for block in model.layers.values():
            block.compile()
    groups = [
        {"params": [p for n, p in model.named_parameters() if model.decays(n)], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if not model.decays(n)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    loop = run.loop
    batch = GlobalBatch(0, loop.controller.next_batch(loop.progress))
    batches = [micro.to(device) for micro in loop.batches.load(batch, loop.micro)]
    tokens = sum(micro.valid_tokens for micro in batches)

    def step() -> None:
        for micro in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = model(micro.tokens_BS, micro.targets_BS) / tokens
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Mean over `count` steps."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return (time.perf_counter() - began) / count


def main() -> None:
    """Measure and print one JSON line."""
    settings = {"rounds": 7, "steps": 5}
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        settings[key] = int(value)
    device = pick_device()
    large = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        run, model = trainer_run(LARGE if large else SMALL, folder)
        for hook in run.loop.hooks:
            hook.on_run_begin(run.loop)
        bare = bare_loop(model, run, compile_blocks=large, half=large)
        for step in (run.loop.step, bare):
            seconds(step, 3, device)
        pairs = [
            (seconds(run.loop.step, settings["steps"], device), seconds(bare, settings["steps"], device))
            for _ in range(settings["rounds"])
        ]
        ratios = [ours / theirs for ours, theirs in pairs]
        result = {
            "trainer_ms": round(1000 * statistics.median(ours for ours, _ in pairs), 2),
            "bare_ms": round(1000 * statistics.median(theirs for _, theirs in pairs), 2),
            "ratio": round(statistics.median(ratios), 4),
            "least": round(min(ratios), 4),
            "most": round(max(ratios), 4),
            "device": torch.cuda.get_device_name() if large else "cpu",
            "torch": torch.__version__,
        }
        print(json.dumps(result))
        run.close()
        run.loop.mesh.close()


if __name__ == "__main__":
    main()
