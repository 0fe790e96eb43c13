"""Choice of the engine: the one place that knows there are two. Callers use the protocol `engine.Engine`."""

from __future__ import annotations

import logging
from dataclasses import replace

from ..config.problems import ConfigError
from ..kernels import precompile, swiglu, symmetric
from ..kernels.attention_blocks import Kernel
from ..kernels.attention_timing import flash4_compilations
from ..kernels.precompile import Compilation
from ..models.config import DecoderConfig
from ..models.mixture import grouped
from ..models.protocol import Model
from ..optim.optimizers.config import OptimConfig
from ..optim.optimizers.matrix_config import MuonConfig
from .attention_choice import choose_attention, ring_kernel_problems, shape_of, windows_of
from .config import ParallelConfig
from .deepspeed.engine import DeepSpeedEngine
from .engine import Engine, EngineSettings, OptimizerFactory
from .mesh import Mesh
from .policies import fused_experts_blocker, fused_swiglu_blocker
from .torch.assembly import SWIGLU, experts_compilations
from .torch.engine import TorchEngine

log = logging.getLogger(__name__)


def make_engine(
    model: Model, mesh: Mesh, make_optimizer: OptimizerFactory, parallel: ParallelConfig, settings: EngineSettings
) -> Engine:
    """Build the engine of `parallel.engine` over a model on the meta device, and fill in the initial weights."""
    shape = model.decoder_config
    if shape is not None and mesh.device.type == "cuda" and settings.precision == "bf16" and settings.seq_len:
        chosen: dict[int | None, Kernel] = {
            window: choose_attention(shape, mesh, parallel, settings.seq_len, window) for window in windows_of(shape)
        }
        settings = replace(settings, attention=chosen)
        if problems := ring_kernel_problems(shape, parallel, chosen):
            raise ConfigError(problems)
    if shape is not None and shape.mixture_layers() and mesh.is_main:
        _tell_of_experts(shape, settings)
    if settings.float8 != "none" and mesh.is_main:
        log.warning("trainer.float8=%s: losses of different layouts differ by float8's rounding", settings.float8)
    if parallel.engine == "torch" and (parallel.deepspeed.config or parallel.deepspeed.cpu_adam) and mesh.is_main:
        log.warning("parallel.engine=torch does not read parallel.deepspeed")  # a resumed run may still have it
    make = DeepSpeedEngine if parallel.engine == "deepspeed" else TorchEngine
    return make(model, mesh, make_optimizer, parallel, settings)


def _tell_of_experts(shape: DecoderConfig, settings: EngineSettings) -> None:
    """Log what computes the experts' products, and warn of what depends on how a batch is cut."""
    blocker = grouped.unsupported_reason(settings.compute, shape.dim, shape.experts.ffn_dim or shape.ffn_dim)
    if blocker is not None:
        log.info("the experts' products are a loop, because F.grouped_mm can't compute them: %s", blocker)
    if shape.experts.capacity is not None:
        log.warning("model.experts.capacity: which tokens are dropped depends on how a batch is cut into ranks and passes")
    if settings.balance.counts == "prefix":
        log.warning("balance.counts=prefix: losses depend on how a batch is cut into passes")


def start_compiling(model: Model, parallel: ParallelConfig, settings: EngineSettings, optim: OptimConfig | None = None) -> None:
    """Pre-compile the third-party kernels that `make_engine` will need, where this machine does not have them yet.

    Called by the first rank of a machine, before it uses its GPU. optim: of a run that trains
    """
    shape = model.decoder_config
    if shape is None or settings.precision != "bf16" or not settings.seq_len:
        return
    works: dict[str, Compilation] = {}
    if isinstance(optim, MuonConfig):
        works[symmetric.NAME] = symmetric.unsupported_reason
    for window in windows_of(shape):
        works |= flash4_compilations(shape_of(shape, parallel, settings.seq_len, window))
    if fused_swiglu_blocker(shape, parallel, settings) is None:
        works[SWIGLU] = swiglu.unsupported_reason
    if fused_experts_blocker(shape, parallel, settings) is None:
        works |= experts_compilations()
    precompile.start(works)
