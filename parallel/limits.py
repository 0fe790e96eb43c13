"""Limits of the engines, checked from the config alone. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from ..config.problems import Problem
from .config import ParallelConfig
from .deepspeed.config import deepspeed_problems


def engine_problems(parallel: ParallelConfig, *, precision: str, world_size: int) -> list[Problem]:
    """Return what the engine of `parallel.engine` can't do. Each value must be valid by itself."""
    if parallel.engine == "torch":
        return list(_torch_problems(parallel))
    problems = deepspeed_problems(parallel, precision, world_size)
    if importlib.util.find_spec("deepspeed") is None:
        fix = "pip install 'meshloom[deepspeed]', or use parallel.engine=torch"
        problems.append(Problem("parallel.engine", "DeepSpeed is not installed", fix, lacks="deepspeed"))
    return problems


def _torch_problems(parallel: ParallelConfig) -> Iterator[Problem]:
    if parallel.offload not in ("none", "cpu"):
        fix = "use none or cpu, or parallel.engine=deepspeed for nvme"
        yield Problem("parallel.offload", f"the torch engine can't offload to '{parallel.offload}'", fix)
    if parallel.offload == "cpu" and max(parallel.tp, parallel.pp, parallel.cp) > 1:
        fix = "use parallel.tp=1, parallel.pp=1 and parallel.cp=1, or parallel.offload=none"
        yield Problem("parallel.offload", "the torch engine offloads under data parallelism only", fix)
    if parallel.offload_weights != "none":
        fix = "parallel.offload=cpu takes them along; or use parallel.engine=deepspeed"
        yield Problem("parallel.offload_weights", "the torch engine does not offload weights apart", fix)


def float8_problems(float8: str, parallel: ParallelConfig, precision: str) -> Iterator[Problem]:
    """Yield why `trainer.float8` can't be used here. float8: not none."""
    yield from float8_layout_problems(parallel, precision)
    if importlib.util.find_spec("torchao") is None:
        yield Problem("trainer.float8", "torchao is not installed", "pip install 'meshloom[float8]'", lacks="torchao")


def float8_layout_problems(parallel: ParallelConfig, precision: str) -> Iterator[Problem]:
    """Yield why a layout can't have `trainer.float8`, on whatever machine."""
    key = "trainer.float8"
    if precision != "bf16":
        yield Problem(key, f"it casts from bf16, and precision is {precision}", "use precision=bf16")
    if parallel.engine != "torch":
        yield Problem(key, f"the {parallel.engine} engine does not have it", "use parallel.engine=torch")
    if parallel.tp > 1:
        yield Problem(key, "tensor parallelism cuts the products that it casts", "use parallel.tp=1")


def masters_problems(parallel: ParallelConfig, precision: str, world_size: int) -> Iterator[Problem]:
    """Yield why a layout can't keep bf16 weights alone (`trainer.masters`, not full). world_size: 0 where it is not known."""
    key, full = "trainer.masters", "or trainer.masters=full"
    if precision != "bf16":
        yield Problem(key, f"weights are rounded to bf16, and precision is {precision}", f"use precision=bf16, {full}")
    if parallel.engine != "torch":
        yield Problem(key, f"the {parallel.engine} engine keeps its own masters", f"use parallel.engine=torch, {full}")
    sharded = parallel.zero >= 2 and world_size > parallel.tp
    if parallel.engine == "torch" and (sharded or parallel.pp > 1 or parallel.offload != "none"):
        message = "FSDP2 holds these weights, and would round their gradients to bf16, too"
        yield Problem(key, message, f"use parallel.zero=1, parallel.pp=1 and parallel.offload=none, {full}")


def measuring_problems(parallel: ParallelConfig, tied: bool, projections: bool) -> list[Problem]:
    """Return why gradient statistics can't be measured for a controller in this layout.

    tied: the head reuses the embedding; projections: whether it wants the workers' products with their mean.
    """
    problems: list[Problem] = []
    fix = "choose batch=fixed, stages, ramp or critical_loss, or"
    if parallel.engine != "torch" and projections:
        problems.append(
            Problem("batch", f"the {parallel.engine} engine has no whole gradient to project on", "use batch=norm_test")
        )
    if parallel.pp > 1 and tied:
        problems.append(
            Problem("batch", "the gradient of a tied embedding can't be measured in a pipeline", f"{fix} model.tied=false")
        )
    if parallel.tp > 1 and projections:
        problems.append(Problem("batch", "projections can't be measured under tensor parallelism", f"{fix} batch=norm_test"))
    return problems
