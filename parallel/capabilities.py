"""Capabilities of a built model: by name, what it lacks for a layout."""

from __future__ import annotations

from collections.abc import Iterator

from ..config.problems import Problem
from ..models.mixture.mixture import mixtures_of
from ..models.protocol import Model, lacks
from .config import ParallelConfig
from .policies import ActivationSettings
from .tensor.placements import unplaced_modules


def model_problems(model: Model, parallel: ParallelConfig, activation: ActivationSettings) -> list[Problem]:
    """List what keeps a model from being trained in a layout: by name, what a user's own class lacks for it."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        more = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
        text = f"every weight is trained here, but {frozen[0]}{more} can't be (requires_grad=False)"
        fix = "leave requires_grad as it is; to keep a weight as it is, let the model's lr_scale(name) be 0.0"
        return [Problem("model", text, fix)]
    return list(_lacking(model, parallel, activation))


def _lacking(model: Model, parallel: ParallelConfig, activation: ActivationSettings) -> Iterator[Problem]:
    kind, how = type(model).__name__, "or define it as meshloom.models.protocol.Model tells"
    unplaced = unplaced_modules(model) if parallel.tp > 1 else []
    if unplaced:
        text = f"no module says in tensor_roles how {unplaced[0]} is cut over tensor-parallel ranks"
        yield Problem("parallel.tp", text, f"use parallel.tp=1, {how}")
    if parallel.pp > 1 and (lacks(model, "carve") or model.decoder_config is None):
        text = f"{kind} has no carve, or no decoder_config, and so can't be cut into balanced stages"
        yield Problem("parallel.pp", text, f"use parallel.pp=1, {how}")
    if parallel.cp > 1 and lacks(model, "use_kernels"):
        text = f"{kind} has no use_kernels, and so can't attend across ranks"
        yield Problem("parallel.cp", text, f"use parallel.cp=1, {how}")
    if parallel.ep > 1 and not mixtures_of(model):
        text = f"{kind} has no mixture of experts whose experts ranks could share out"
        yield Problem("parallel.ep", text, f"use parallel.ep=1, {how}")
    if parallel.hdp != "none" and lacks(model, "use_kernels"):
        text = f"{kind} has no use_kernels, and so can't attend across ranks"
        yield Problem("parallel.hdp", text, f"use parallel.hdp=none, {how}")
    if activation.policy != "none" and not model.block_modules():
        text = f"{kind} has no block_modules, and policies are of blocks"
        yield Problem("trainer.activation", text, f"use none, {how}")
    if activation.budget is not None and model.decoder_config is None:
        text = f"{kind} has no decoder_config, so what its blocks keep is not known"
        yield Problem("trainer.activation_budget", text, "choose trainer.activation, or leave the budget null")
