"""From a model on the meta device to this rank's stages of it: carved, their blocks and seams in their parallel forms, and
filled with initial weights. `engine.py` calls these in order; sharding and storage come between.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ...kernels import swiglu
from ...kernels.precompile import compiled
from ...models.init import fill
from ...models.llama import Block, Llama
from ..activation import apply_policies
from ..config import ParallelConfig
from ..context.split import ContextParallel
from ..engine import EngineSettings
from ..mesh import Mesh
from ..pipeline.stages import StagePlan, splits_backward
from ..policies import fused_swiglu_blocker
from ..shards import local
from ..tensor.placements import apply_tensor_parallelism
from .float8 import use_float8
from .strategy import LocalWeight

log = logging.getLogger(__name__)

SWIGLU = "SwiGLU inside its products"


def own_stages(model: Llama, plan: StagePlan, rank: int) -> dict[int, Llama]:
    """This pipeline rank's stages by their index; the model itself where it is not cut."""
    return {
        index: model.carve(plan.layers[index], first=index == 0, last=index == plan.count - 1) for index in plan.held_by(rank)
    }


def fuses_swiglu(model: Llama, mesh: Mesh, parallel: ParallelConfig, settings: EngineSettings, policies: Sequence[str]) -> bool:
    """Whether blocks compute SwiGLU inside the products around it: on all ranks or on none. Every rank must ask.

    policies: the activation policy of every block of the whole model.
    """
    if mesh.device.type != "cuda":
        return False
    reason = fused_swiglu_blocker(model.config, parallel, settings, policies)
    if reason is None:
        with contextlib.suppress(Exception):  # it says why below
            swiglu.package()  # seconds, in which others may compile
        compiled(SWIGLU, swiglu.why_not, mesh.device)
        mine = swiglu.why_not(mesh.device)
        if mine is not None and not mesh.is_main:
            log.warning("rank %d can't compute SwiGLU inside the products around it: %s", mesh.rank, mine)
        if mesh.any(mine is not None):
            reason = mine or "another rank can't"
    if reason is not None and mesh.is_main:
        log.info("SwiGLU is not computed inside the products around it: %s", reason)
    return reason is None


def apply_forms(
    stage: Llama,
    policies: Sequence[str],
    mesh: Mesh,
    context: ContextParallel | None,
    parallel: ParallelConfig,
    settings: EngineSettings,
    *,
    fuse_swiglu: bool,
) -> None:
    """Put into a stage what acts inside of it, in the only order that works: each takes what the ones before have made.

    policies: the activation policy of every block of the whole model; fuse_swiglu: `fuses_swiglu` said so.
    """
    if context is not None:
        context.apply(stage)
    if settings.float8 != "none":
        use_float8(stage.layers.values(), settings.float8, mesh.device)
    if mesh.layout.tp > 1:
        apply_tensor_parallelism(stage, mesh.axes["tp"], parallel.sequence_parallel)
    own = [policies[int(name)] for name in stage.layers]
    # Before 2.13 torch can't run the second half of a backward pass through an operator of several gradients.
    if mesh.layout.tp == 1 and not splits_backward(parallel):
        _allow_fused(stage.layers.values(), own, fuse_swiglu)
    apply_policies(list(stage.layers.values()), own, compiled=settings.compile)


def _allow_fused(blocks: Iterable[nn.Module], policies: Sequence[str], swiglu_too: bool) -> None:
    """Let blocks whose weights are whole where they are used compute several modules at once."""
    for block, policy in zip(blocks, policies, strict=True):
        if isinstance(block, Block):
            block.fused = True
            block.ffn.fused = swiglu_too and policy != "selective"  # which keeps one of its products


def fill_weights(weights: Mapping[str, LocalWeight], model: Llama, seed: int, on: torch.device) -> None:
    """Draw initial values by name and place (rule R3). on: the device that draws them."""
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
