"""Assembly of this rank's stages from a model on the meta device: carve them, parallelize them, and fill in initial weights.

`engine.py` calls these in order; sharding and storage come between.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Mapping

import torch

from ...kernels import precompile, swiglu, symmetric
from ...kernels.attention import CausalAttention
from ...kernels.experts import fused as fused_experts
from ...kernels.experts.fused import FusedExperts
from ...kernels.norm import FusedNorm
from ...kernels.precompile import Compilation
from ...kernels.swiglu import FusedSwiglu
from ...models.config import DecoderConfig
from ...models.init import fill
from ...models.protocol import BlockKernels, Model
from ...optim.optimizers.muon import Muon
from ..activation import Timer, apply_policies
from ..config import ParallelConfig
from ..context.split import ContextParallel
from ..engine import EngineSettings
from ..experts.dispatch import spread_experts
from ..hybrid.attention import HybridAttention
from ..mesh import Mesh
from ..on_host import RowOffload
from ..pipeline.stages import StagePlan, splits_backward
from ..policies import dense_feed_forwards, fused_experts_blocker, fused_swiglu_blocker
from ..shards import local
from ..tensor.placements import apply_tensor_parallelism
from .float8 import use_float8
from .strategy import LocalWeight

log = logging.getLogger(__name__)

SWIGLU = "SwiGLU inside its products"
EXPERTS = "experts' products with gathering and SwiGLU inside"


def experts_compilations() -> dict[str, Compilation]:
    """Return what compiles the kernels of experts, by name: several processes do it at once."""
    return {f"{EXPERTS}: {name}": work for name, work in fused_experts.compilations().items()}


def own_stages(model: Model, plan: StagePlan, rank: int) -> dict[int, Model]:
    """Carve out this pipeline rank's stages, by their index; the model itself where there is no pipeline."""
    return {
        index: model.carve(plan.layers[index], first=index == 0, last=index == plan.count - 1) for index in plan.held_by(rank)
    }


def fuses_swiglu(model: Model, mesh: Mesh, parallel: ParallelConfig, settings: EngineSettings) -> bool:
    """Return whether blocks compute SwiGLU inside the products around it, on all ranks alike. Every rank must call it."""
    shape = model.decoder_config
    if shape is None or mesh.device.type != "cuda":
        return False
    if not dense_feed_forwards(shape):
        return False
    blocker = fused_swiglu_blocker(shape, parallel, settings)
    return _works_on_all(mesh, SWIGLU, blocker, swiglu.unsupported_reason, {SWIGLU: swiglu.unsupported_reason})


def fuses_experts(model: Model, mesh: Mesh, parallel: ParallelConfig, settings: EngineSettings) -> bool:
    """Return whether mixtures use `kernels/experts/fused.py`, on all ranks alike. Every rank must call it."""
    shape = model.decoder_config
    if shape is None or mesh.device.type != "cuda" or not shape.experts.count:
        return False
    blocker = fused_experts_blocker(shape, parallel, settings)
    return _works_on_all(mesh, EXPERTS, blocker, fused_experts.unsupported_reason, experts_compilations())


def agree_on_symmetric_products(optimizer: torch.optim.Optimizer, mesh: Mesh, settings: EngineSettings) -> None:
    """Let the optimizer's symmetric products be computed by their kernel, if all ranks can. Every rank must call it."""
    if mesh.device.type != "cuda" or settings.compute != torch.bfloat16 or not isinstance(optimizer, Muon):
        return
    tried = symmetric.unsupported_reason
    symmetric.set_allowed(_works_on_all(mesh, symmetric.NAME, None, tried, {symmetric.NAME: tried}))


def _works_on_all(
    mesh: Mesh,
    kernel: str,
    blocker: str | None,
    unsupported_reason: Callable[[torch.device], str | None],
    compilations: Mapping[str, Compilation],
) -> bool:
    """Return whether a third-party kernel can be used on every rank, and log why if not. blocker: why it may not be."""
    if blocker is None:
        with contextlib.suppress(Exception):  # it says why below
            swiglu.package()  # seconds, in which others may compile
        for name, compilation in compilations.items():
            precompile.wait(name, compilation, mesh.device)
        mine = unsupported_reason(mesh.device)
        if mine is not None and not mesh.is_main:
            log.warning("rank %d can't use the kernel of %s: %s", mesh.rank, kernel, mine)
        if mesh.any(mine is not None):
            blocker = mine or "another rank can't"
    if blocker is not None and mesh.is_main:
        log.info("no kernel computes %s: %s", kernel, blocker)
    return blocker is None


def parallelize_stage(
    stage: Model,
    mesh: Mesh,
    context: ContextParallel | HybridAttention | None,
    parallel: ParallelConfig,
    settings: EngineSettings,
    *,
    fuse_swiglu: bool,
    fuse_experts: bool,
    offload: RowOffload | None = None,
) -> None:
    """Apply kernels, float8, expert and tensor parallelism, and activation policies to a stage. The order matters.

    fuse_swiglu, fuse_experts: the results of `fuses_swiglu` and `fuses_experts`; offload: of rows' activations.
    """
    blocks = stage.block_modules()
    policies = {layer: settings.policy(layer) for layer in blocks}
    # Their weights must be whole where they are used. Before 2.13 torch can't run the second half of a backward pass through
    # an operator of several gradients.
    fused = mesh.layout.tp == 1 and not splits_backward(parallel)
    kernels: dict[int, BlockKernels] = {}
    for layer in blocks:
        kernel = settings.kernel(stage.decoder_config, layer)
        attend = CausalAttention(kernel) if context is None else context.with_kernel(kernel)
        # Selective checkpointing keeps one of the products that fused SwiGLU computes.
        whole = fused and fuse_swiglu and policies[layer] != "selective"
        kernels[layer] = BlockKernels(
            attend,
            norm=FusedNorm() if fused else None,
            swiglu=FusedSwiglu() if whole else None,
            experts=FusedExperts() if fused and fuse_experts else None,
        )
    stage.use_kernels(kernels)
    if settings.float8 != "none":
        use_float8(blocks.values(), settings.float8, mesh.device)
    elsewhere = spread_experts(stage, mesh.axes["ep"]) if mesh.layout.ep > 1 else ()
    if mesh.layout.tp > 1:
        apply_tensor_parallelism(stage, mesh.axes["tp"], parallel.sequence_parallel, elsewhere)
    hidden = [] if offload is None else [functools.partial(offload.begin_block, layer) for layer in blocks]
    timed = _layer_timers(stage.decoder_config, mesh, settings, blocks)
    apply_policies(list(blocks.values()), list(policies.values()), compiled=settings.compile, hidden=hidden, timed=timed)


def _layer_timers(
    shape: DecoderConfig | None, mesh: Mesh, settings: EngineSettings, layers: Iterable[int]
) -> list[Timer | None]:
    """Return what measures the forward passes of these layers, where each rank is alone in its pipeline's stage.

    Work differs from stage to stage, but not that of layers of the same kind. The most frequent kind is measured.
    """
    if not 1 < mesh.layout.pp == mesh.layout.world_size:
        return []
    if shape is None:
        return [mesh.compute_time.layer for _ in layers]
    kinds = [(block, settings.policy(layer)) for layer, block in enumerate(shape.blocks())]
    usual = max(kinds, key=kinds.count)
    return [mesh.compute_time.layer if kinds[layer] == usual else None for layer in layers]


def fill_weights(weights: Mapping[str, LocalWeight], model: Model, seed: int, on: torch.device) -> None:
    """Draw initial values by parameter name and box (rule R3). on: the device that draws them."""
    for name, weight in weights.items():
        place = weight.placed
        fill(
            local(weight.tensor),
            model.initial(name),
            seed=seed,
            name=name,
            global_shape=place.global_shape,
            offsets=place.box.offsets,
            on=on,
        )
