"""Say at the start which steps measure the gradient's noise where ranks share a micro-batch: such steps take longer."""

from __future__ import annotations

from ..optim.batch.config import AdaptiveConfig
from .schema import RunConfig


def ranks_share_workers(config: RunConfig) -> bool:
    """Return whether a measured step is dealt or exchanged in another way than an ordinary one."""
    return config.batch.MEASURES and (config.parallel.cp > 1 or config.parallel.hdp != "none")


def measuring_notices(config: RunConfig) -> list[str]:
    """Return what a start says of measured steps: how many there are, what they do, and the keys that change it."""
    if {"batch", "parallel", "data"} & set(config.unusable) or not ranks_share_workers(config):
        return []
    batch, parallel = config.batch, config.parallel
    told = f"batch={batch.name}"
    if not isinstance(batch, AdaptiveConfig):
        which, fix = f"{told}: steps that it measures", ""
    elif batch.ema > 0:
        which = f"{told} measures every step, since batch.ema={batch.ema:g} smooths: they"
        fix = f"; with batch.ema=0 only one in batch.interval={batch.interval} is measured"
    elif batch.interval == 1:
        which, fix = f"{told} measures every step: they", "; batch.interval=4 measures one in four"
    else:
        which, fix = f"{told} measures one step in batch.interval={batch.interval}: they", ""
    if parallel.hdp == "none":
        return [f"{which} send a gradient more for each micro-batch (parallel.cp={parallel.cp}){fix}"]
    return [f"{which} are dealt worker by worker, not by the balanced plan of parallel.hdp={parallel.hdp}{fix}"]
