"""Refusals of what does not go together with local updating, by key. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from ..config.problems import Problem
from ..optim.batch.config import StagesConfig
from ..optim.local.config import SYNCHRONOUS, LocalConfig
from ..optim.optimizers.config import ScheduleFreeConfig
from .schema import RunConfig

WITHOUT_ISLANDS = "or optim.local.islands=1"


def local_notices(local: LocalConfig) -> list[str]:
    """Return what to say of keys that nothing reads, since there is one island."""
    names = [field.name for field in fields(local) if getattr(local, field.name) != getattr(SYNCHRONOUS, field.name)]
    if local.active or not names:
        return []
    keys = ", ".join(f"optim.local.{name}" for name in names)
    return [f"{keys}: without effect, because optim.local.islands is 1"]


def local_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what keeps the islands of `optim.local` from training by themselves."""
    local, parallel, batch, trainer = config.optim.local, config.parallel, config.batch, config.trainer
    if not local.active:
        return

    def refuse(key: str, why: str, fix: str) -> Problem:
        return Problem(key, f"{why}, with optim.local.islands={local.islands}", f"{fix}, {WITHOUT_ISLANDS}")

    if parallel.engine != "torch":
        yield refuse("parallel.engine", "DeepSpeed's weights can't be exchanged between islands", "use parallel.engine=torch")
    if parallel.pp > 1:
        yield refuse("parallel.pp", "islands do not run pipelines yet", "use parallel.pp=1")
    if parallel.hdp != "none":
        yield refuse("parallel.hdp", "documents are dealt over all processes, not inside an island", "use parallel.hdp=none")
    if parallel.offload != "none":
        yield refuse("parallel.offload", "outer weights lie on the device", "use parallel.offload=none")
    shape = config.model.decoder()
    if shape is not None and shape.mixture_layers():
        yield refuse("model.experts.count", "the load of experts is balanced over all processes", "use model.experts.count=0")
    if batch.MEASURES or batch.name == "critical_loss":
        fix = "use batch=fixed, stages or ramp"
        yield refuse("batch", "the controller would decide on each island by what that has measured", fix)
    if config.optim.compares_halves():
        yield refuse("optim", "each island would compare halves of its own part of a batch", "use another optimizer")
    if isinstance(config.optim, ScheduleFreeConfig):
        yield refuse("optim", "its averages and the outer weights would each be what is evaluated", "use another optimizer")
    if trainer.on_bad_step == "rewind":
        text = "one island can't take back what the others have used already"
        yield refuse("trainer.on_bad_step", text, "use trainer.on_bad_step=skip or stop")
    if config.stages:
        yield refuse("stages", "a stage would begin in the middle of a round", "train one stage")


def smallest_batch_problems(config: RunConfig, least: int) -> Iterator[Problem]:
    """Yield a problem if the smallest batch of the run, `least` samples, leaves an island without any."""
    islands = config.optim.local.islands
    if least < islands:
        staged = isinstance(config.batch, StagesConfig) and any(size == least for _, size in config.batch.points())
        key = "batch.stages" if staged else "batch.samples"
        message = f"{least} samples leave an island without any, with optim.local.islands={islands}"
        yield Problem(key, message, f"use {islands} or more, {WITHOUT_ISLANDS}")
