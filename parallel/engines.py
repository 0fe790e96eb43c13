"""Which engine: the one place that knows there are two. Above it everything speaks `engine.Engine`."""

from __future__ import annotations

import logging
from dataclasses import replace

from ..kernels import precompile, swiglu
from ..kernels.attention_timing import flash4_compilations
from ..kernels.precompile import Work
from ..models.config import DecoderConfig
from ..models.protocol import Model
from .attention_choice import choose_attention, shape_of
from .config import ParallelConfig
from .cost import RankCost
from .deepspeed.engine import DeepSpeedEngine
from .deepspeed.memory import deepspeed_cost
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

log = logging.getLogger(__name__)


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
