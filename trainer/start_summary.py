"""Say at the start what a run is: its size, its length, and what computes it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..config.duration import Unit
from ..data.order import Shuffled
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
        length.append(f"{total:,} in all")
        if isinstance(samples_of_data := data.train(), Shuffled) and loop.stage is None:
            epoch = samples_of_data.epoch_size
            length.append(f"{total / (epoch * seq_len):.3g} epochs of {epoch:,} samples")
    yield ", ".join(length)


def _total_tokens(run: Run) -> int | None:
    """Return the tokens of the whole run, past steps as they were; None if a batch size that changes decides."""
    horizon, progress = run.loop.horizon, run.loop.progress
    today = progress.before(run.loop.controller.next_batch(progress), horizon.seq_len)
    total = horizon.convert(horizon.total, horizon.unit, Unit.TOKENS, today)
    return math.ceil(total) if math.isfinite(total) else None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
