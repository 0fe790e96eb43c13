"""Say at the start what a run is: its size, its length, and what computes it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..config.duration import Unit
from ..config.words import counted
from ..data.samples.order import Shuffled
from .build import Run, build_model
from .schema import RunConfig


def start_summary(config: RunConfig, run: Run) -> Iterator[str]:
    """Yield a line about the model and the machine, and one about the length of the run."""
    loop, data = run.loop, run.data
    vocabulary = config.model.vocabulary or data.vocabulary
    parameters = sum(parameter.numel() for parameter in build_model(config.model, vocabulary).parameters())
    yield (
        f"{parameters:,} parameters, vocabulary {vocabulary:,}, {config.precision} on {_device(loop.mesh.device)}, "
        f"engine {config.parallel.engine}"
    )
    samples, seq_len = loop.controller.next_batch(loop.progress), data.seq_len
    length = [f"{samples * seq_len:,} tokens a step ({samples:,} samples of {seq_len:,})"]
    total = _total_tokens(run)
    if total is not None:
        asked = loop.horizon.total if loop.horizon.unit is Unit.TOKENS and loop.stage is None else total
        length.append(f"{total:,} in all{'' if asked == total else f' (trainer.tokens={asked:.0f}, in whole steps)'}")
        if isinstance(samples_of_data := data.train(), Shuffled) and loop.stage is None:
            epoch = samples_of_data.epoch_size
            length.append(f"{total / (epoch * seq_len):.3g} epochs of {epoch:,} samples")
    yield ", ".join(length)
    if (local := config.optim.local).active:
        size, turns = loop.island.layout.island_ranks, f" in {local.fragments} turns" if local.fragments > 1 else ""
        present = loop.mesh.layout.islands
        count = f"{present} of {local.islands}" if present < local.islands else f"{present}"
        yield (
            f"{count} islands of {counted(size, 'process')}, which join what they have learned every"
            f" {local.inner_steps} steps{turns} (optim.local); the loss of steps is the first island's"
        )
    if not loop.engine.masks_updates:
        yield (
            "each update waits on the host until the step is judged (trainer.on_bad_step): this optimizer, or engine, can't be"
            " told on the device to skip it"
        )


def batch_jump(run: Run) -> str | None:
    """Say that a resumed run's next batch is far from its last one: its size may be counted from the start of the run."""
    progress, controller = run.loop.progress, run.loop.controller
    before, now = progress.batch, controller.next_batch(progress)
    if not progress.step or max(before, now) <= 2 * min(before, now) or run.loop.horizon.batch is not None:
        return None
    return (
        f"the batch has {now:,} samples from step {progress.step + 1} on, and had {before:,} before: its size is counted from "
        "the start of the run, not from the resume"
    )


def _total_tokens(run: Run) -> int | None:
    """Return the tokens of the whole run, past steps as they were; None if a batch size that changes decides."""
    horizon, progress = run.loop.horizon, run.loop.progress
    today = progress.before(run.loop.controller.next_batch(progress), horizon.seq_len)
    total = horizon.convert(horizon.total, horizon.unit, Unit.TOKENS, today)
    whole = horizon.unit is Unit.TOKENS and horizon.batch is not None and run.loop.stage is None
    if whole and total > progress.tokens:  # the last step is whole, too
        step = horizon.stride(today, Unit.TOKENS)
        return round(progress.tokens + math.ceil((total - progress.tokens) / step) * step)
    return math.ceil(total) if math.isfinite(total) else None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
