"""Which engine: the one place that knows there are two. Above it everything speaks `engine.Engine`."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import replace

from ..config.problems import Problem
from ..kernels import precompile, swiglu
from ..kernels.attention_timing import flash4_compilations
from ..kernels.precompile import Work
from ..models.config import DecoderConfig
from ..models.protocol import Model
from .attention_choice import choose_attention, shape_of
from .config import ParallelConfig
from .cost import RankCost
from .deepspeed.config import deepspeed_problems
from .deepspeed.engine import DeepSpeedEngine
from .deepspeed.memory import deepspeed_cost
from .deepspeed.optimizer import optimizer_problems
from .deepspeed.speed import deepspeed_moved
from .engine import Engine, EngineSettings, OptimizerFactory
from .layout import Layout
from .memory import Job, pieces
from .mesh import Mesh
from .offload import OffloadAccount, torch_offload_cost
from .policies import fused_swiglu_blocker
from .speed import Moved, torch_moved
from .torch.assembly import SWIGLU
from .torch.engine import TorchEngine
from .torch.float8 import float8_problems

log = logging.getLogger(__name__)

ENGINES = ("torch", "deepspeed")


def engine_problems(
    parallel: ParallelConfig,
    make_optimizer: OptimizerFactory,
    *,
    precision: str,
    world_size: int,
    float8: str = "none",
) -> list[Problem]:
    """Everything about the engine that can't be, before anything is started."""
    if parallel.engine not in ENGINES:
        return [Problem("parallel.engine", f"there is no '{parallel.engine}'", f"use {' or '.join(ENGINES)}")]
    problems = [*float8_problems(float8, parallel, precision), *_unread_problems(parallel)]
    if parallel.engine == "torch":
        return [*problems, *_torch_problems(parallel)]
    problems += deepspeed_problems(parallel, precision, world_size)
    if importlib.util.find_spec("deepspeed") is None:
        fix = "pip install 'meshloom[deepspeed]', or use parallel.engine=torch"
        problems.append(Problem("parallel.engine", "DeepSpeed is not installed", fix))
    return problems + optimizer_problems(make_optimizer)


def _unread_problems(parallel: ParallelConfig) -> Iterator[Problem]:
    if parallel.offload_path is not None and "nvme" not in (parallel.offload, parallel.offload_weights):
        fix = "leave it null, or use parallel.offload=nvme"
        yield Problem("parallel.offload_path", "nothing is offloaded to nvme, so nobody would look there", fix)


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


def make_engine(
    model: Model, mesh: Mesh, make_optimizer: OptimizerFactory, parallel: ParallelConfig, settings: EngineSettings
) -> Engine:
    """The engine of `parallel.engine`, holding the model (which comes on the meta device) with its initial weights."""
    shape = model.decoder_config
    if shape is not None and mesh.device.type == "cuda" and settings.precision == "bf16" and settings.seq_len:
        settings = replace(settings, attention=choose_attention(shape, mesh, parallel, settings.seq_len))
    if settings.float8 != "none" and mesh.is_main:
        log.warning("trainer.float8=%s: losses of different layouts differ by float8's rounding", settings.float8)
    if parallel.engine == "torch" and (parallel.deepspeed.config or parallel.deepspeed.cpu_adam) and mesh.is_main:
        log.warning("parallel.engine=torch does not read parallel.deepspeed")  # a resumed run may still have it
    make = DeepSpeedEngine if parallel.engine == "deepspeed" else TorchEngine
    return make(model, mesh, make_optimizer, parallel, settings)


def start_compiling(model: DecoderConfig, parallel: ParallelConfig, settings: EngineSettings) -> None:
    """Start to compile the third-party kernels that `make_engine` will need, where this machine does not have them yet.

    For the first rank of a machine, before it uses its GPU.
    """
    if settings.precision != "bf16" or not settings.seq_len:
        return
    works: dict[str, Work] = {**flash4_compilations(shape_of(model, parallel, settings.seq_len))}
    policy = settings.activation if settings.activation_budget is None else "none"  # which some blocks may have
    if fused_swiglu_blocker(model, parallel, settings, [policy]) is None:
        works[SWIGLU] = swiglu.unsupported_reason
    precompile.start(works)


def engine_cost(
    rank: RankCost, model: Model, parallel: ParallelConfig, layout: Layout, job: Job
) -> tuple[RankCost, OffloadAccount]:
    """What the engine makes of a rank's account: what its GPU holds, what is elsewhere, and what a step moves between them.

    rank: as `cost.layout_cost` gives it for this `parallel`.
    """
    if parallel.engine == "deepspeed":
        return deepspeed_cost(rank, model, parallel, job, layout.world_size)
    if parallel.offload != "none":
        return torch_offload_cost(rank, pieces(model, layout), layout.zero, job)
    return rank, OffloadAccount()


def engine_moved(parallel: ParallelConfig) -> Moved:
    """How to count what the engine's step moves, for `speed.step_seconds`."""
    return deepspeed_moved if parallel.engine == "deepspeed" else torch_moved
