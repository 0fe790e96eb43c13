"""Measure the trainer's overhead: seconds of its step beside hand-written loops around the same model and data.

    python benchmarks/step_overhead.py                              # GPU: Decoder 1B, 2 × 8,192 tokens; CPU: a small model
    python benchmarks/step_overhead.py size=small rounds=9 steps=20 # GPU: a step of some milliseconds, where overhead shows
    python benchmarks/step_overhead.py against=same                 # GPU: one of the two loops by hand alone
    python benchmarks/step_overhead.py syncs=1                      # GPU: and every place of a step that waits for the device

Three loops take turns in one process, each on a model of its own with the same initial weights:

    trainer  the trainer's step and its hooks as `Loop.run` calls them: data, metrics, their file, schedule, stop requests
    same     by hand with the trainer's kernels: bf16 weights, fp32 masters, one pass for clipping, AdamW and the copy. What it
             leaves out is the trainer's cost. (Without a GPU there are no such kernels, and nothing to tell from `plain`.)
    plain    by hand as PyTorch's documentation shows it: fp32 weights, autocast, `cross_entropy` of whole logits,
             `clip_grad_norm_`, fused `torch.optim.AdamW`

The loops by hand have their tokens on the device from the start, a constant rate, and read no number. A round times so many
steps of each, between two waits for the device; the printed ratios are medians over rounds, with the least and the most.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from arguments import read

from meshloom.data.batch import GlobalBatch, MicroBatch
from meshloom.data.build import build_node
from meshloom.models.decoder import Decoder
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh, pick_device
from meshloom.trainer.build import Run, build_model, build_run
from meshloom.trainer.schema import make_composer
from meshloom.trainer.typed import typed_config

Step = Callable[[], torch.Tensor]

COMPILED = ["trainer.activation=none", "trainer.compile=true"]
SHAPE = {"dim": 768, "layers": 12, "heads": 12, "kv_heads": 4, "ffn_dim": 2048, "vocabulary": 32_000}
SIZES = {
    "tiny": ["recipe=quickstart", "data=synthetic", "data.vocabulary=4096", "batch.samples=32", "batch.micro=8"],
    "small": [
        "recipe=llama_1b",
        *(f"model.{key}={size}" for key, size in SHAPE.items()),
        "data.seq_len=1024",
        "batch.samples=8",
        "batch.micro=8",
        *COMPILED,
    ],
    "1B": ["recipe=llama_1b", "batch.samples=2", "batch.micro=2", *COMPILED],
}
ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8}
DECAY = 0.1
MAX_NORM = 1.0


@dataclasses.dataclass
class Settings:
    """One measurement. size: one of SIZES; steps: of each loop in a round; syncs: 1 lists the places that wait for a GPU."""

    size: str = "1B" if torch.cuda.is_available() else "tiny"
    rounds: int = 7
    steps: int = 5
    syncs: int = 0
    against: str = "plain,same" if torch.cuda.is_available() else "plain"


def trainer_run(overrides: list[str], folder: str) -> tuple[Run, Callable[[], Decoder]]:
    """A run of the trainer, and what makes further models of its shape, on the meta device."""
    always = ["trainer.tokens=null", "trainer.steps=100000", "trainer.eval_every=0", "checkpoint.every=0"]
    quiet = ["trainer.sample_prompt=null", "logging.progress=false", f"output_dir={folder}"]
    composition = make_composer().compose([*overrides, *always, *quiet])
    assert not composition.problems, composition.problems
    config, _ = typed_config(composition.config)
    data = build_node(config.data, config.seed, config.model.vocabulary)
    data.prepare()
    mesh = Mesh.connect(Layout.plan(config.parallel, 1), pick_device())
    return build_run(config, {}, data, mesh), lambda: build_model(config.model, data.vocabulary)


def by_trainer(run: Run) -> Step:
    """A step of the trainer with its hooks."""
    loop = run.loop
    for hook in loop.hooks:
        hook.on_run_begin(loop)

    def step() -> torch.Tensor:
        loop.step()
        for hook in loop.hooks:
            hook.on_step_end(loop)
        return torch.tensor(loop._last_loss)

    return step


def materialized(model: Decoder, weights: dict[str, torch.Tensor], dtype: torch.dtype, compiled: bool) -> Decoder:
    """A model with these weights in this type, its blocks compiled on request."""
    device = next(iter(weights.values())).device
    model.to(dtype).to_empty(device=device)
    if model.config.tied and model.head is not None and model.embed is not None:
        model.head.weight = model.embed.weight
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    if compiled:
        for block in model.layers.values():
            block.compile()
    return model


def by_hand_plain(model: Decoder, batches: Sequence[MicroBatch], half: bool) -> Step:
    """fp32 weights, autocast where the precision is bf16, everything else torch's own."""
    device = batches[0].tokens_BS.device
    groups = [
        {"params": [p for n, p in model.named_parameters() if model.decays(n)], "weight_decay": DECAY},
        {"params": [p for n, p in model.named_parameters() if not model.decays(n)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True, **ADAMW)  # type: ignore[arg-type]
    tokens = sum(micro.valid_tokens for micro in batches)

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for micro in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits_BSV = model(micro.tokens_BS)
                loss = F.cross_entropy(logits_BSV.flatten(0, 1), micro.targets_BS.flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def by_hand_same(model: Decoder, masters: dict[str, torch.Tensor], batches: Sequence[MicroBatch]) -> Step:
    """bf16 weights beside fp32 masters, and the trainer's own AdamW kernel; for a single micro-batch."""
    from meshloom.kernels.triton_adamw import adamw_update

    parameters = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(master), torch.zeros_like(master)) for name, master in masters.items()}
    (micro,) = batches
    tokens = micro.valid_tokens
    count = 0

    def step() -> torch.Tensor:
        nonlocal count
        count += 1
        loss = model(micro.tokens_BS, micro.targets_BS) / tokens
        loss.backward()
        with torch.no_grad():
            norms = torch._foreach_norm([parameter.grad for parameter in parameters.values()], 2, torch.float32)
            scale = (MAX_NORM / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
            for name, parameter in parameters.items():
                decay = DECAY if model.decays(name) else 0.0
                tensors = (masters[name], parameter.grad, *moments[name], parameter, scale)
                adamw_update(*tensors, step=count, weight_decay=decay, **ADAMW)
                parameter.grad = None
        return loss.detach()

    return step


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step: Step, count: int, device: torch.device) -> float:
    """Mean over `count` steps."""
    wait(device)
    began = time.perf_counter()
    for _ in range(count):
        step()
    wait(device)
    return (time.perf_counter() - began) / count


def host_seconds(step: Step, device: torch.device) -> float:
    """Return the host's seconds for queueing one step, where it never waits for the device."""
    wait(device)
    began = time.perf_counter()
    step()
    found = time.perf_counter() - began
    wait(device)
    return found


def waiting_places(step: Step) -> Counter[str]:
    """List the places, by file and line, where a step makes the host wait for the device (torch's sync debug mode)."""
    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        frames = [frame for frame in traceback.extract_stack()[:-1] if "meshloom" in frame.filename]
        if "synchroniz" in str(message) and frames:
            places[f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return places


def spread(values: Sequence[float], digits: int) -> list[float]:
    """Median, least and most."""
    return [round(value, digits) for value in (statistics.median(values), min(values), max(values))]


def main() -> None:
    """Measure and print one JSON line."""
    device = pick_device()
    gpu = device.type == "cuda"
    settings = read(Settings(), sys.argv[1:])
    rounds, steps = settings.rounds, settings.steps
    with tempfile.TemporaryDirectory() as folder:
        run, shape = trainer_run(SIZES[settings.size], folder)
        loop = run.loop
        weights = {f.name: f.tensor.clone() for f in loop.engine.fragments() if f.role == "weight"}
        share = loop.batches.load(GlobalBatch(0, loop.controller.samples), loop.controller.micro)
        batches = [micro.to(device) for micro in share.micro_batches]
        loops = {"trainer": by_trainer(run)}
        if "plain" in settings.against:
            loops["plain"] = by_hand_plain(materialized(shape(), weights, torch.float32, gpu), batches, half=gpu)
        if "same" in settings.against:
            loops["same"] = by_hand_same(materialized(shape(), weights, torch.bfloat16, gpu), weights, batches)
        first = {name: round(float(step()), 5) for name, step in loops.items() if name != "trainer"}
        loops["trainer"]()
        loop.deliver_metrics(keep=0)
        first["trainer"] = round(loop._last_loss, 5)  # all three began as one model: they are to agree
        for step in loops.values():
            seconds(step, 3, device)
        times: dict[str, list[float]] = {name: [] for name in loops}
        for at in range(rounds):
            order = list(loops.items())
            for name, step in order if at % 2 else reversed(order):
                times[name].append(seconds(step, steps, device))
        result: dict[str, object] = {"size": settings.size, "rounds": rounds, "steps": steps, "first_loss": first}
        for name, of_rounds in times.items():
            result[f"{name}_ms"] = spread([1000 * value for value in of_rounds], 3)
            result[f"{name}_host_ms"] = spread([1000 * host_seconds(loops[name], device) for _ in range(5)], 3)
        for name in times.keys() - {"trainer"}:
            ratios = [ours / theirs for ours, theirs in zip(times["trainer"], times[name], strict=True)]
            result[f"ratio_to_{name}"] = spread(ratios, 4)
        if gpu and settings.syncs:
            result["waits"] = {name: waiting_places(step) for name, step in loops.items()}
        result |= {"device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__}
        print(json.dumps(result))
        run.close()
        loop.mesh.close()


if __name__ == "__main__":
    main()
