"""Problems found only by building a run's objects: on the meta device and over small parameters, without their memory."""

from __future__ import annotations

from typing import Any

import torch

from ..config.nodes import Custom
from ..config.problems import Problem
from ..data.build import build_node
from ..models.config import CustomModel
from ..models.protocol import decoder_shape
from ..optim.batch.controller import Controller
from ..optim.build import build_controller, build_schedule
from ..optim.optimizers.parameters import NamedParameter, Unsharded
from ..parallel.deepspeed.optimizer import optimizer_problems
from ..parallel.legality import Work, layout_and_model_problems, model_problems
from ..parallel.limits import measuring_problems
from ..parallel.policies import block_policies
from ..parallel.torch.float8 import float8_size_problems
from .build import build_model, engine_settings, optimizer_factory
from .derived import build_horizon
from .hooks.base import hook_problems
from .relations import collect_problems
from .schema import RunConfig

SHAPE = ("layers", "heads", "kv_heads", "ffn_dim")


def build_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Return the problems found by building a config without other problems, on `world_size` processes (0: not known)."""
    found = [*decoder_layout_problems(config, world_size), *hook_problems(config.trainer.hooks)]
    if isinstance(config.data, Custom):
        found += collect_problems("data", lambda: build_node(config.data, config.seed, config.model.vocabulary).problems())
    optimizer = collect_problems("optim", lambda: _optimizer_problems(config))
    if not optimizer and world_size and config.parallel.engine == "deepspeed":
        optimizer = collect_problems("optim", lambda: optimizer_problems(optimizer_factory(config.optim)))
    found += optimizer
    found += collect_problems("model", lambda: _model_problems(config))
    if isinstance(config.schedule, Custom):
        found += collect_problems("schedule", lambda: _schedule_problems(config))
    found += collect_problems("batch", lambda: _batch_problems(config))
    return found


def decoder_layout_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Return what keeps the torch engine from running a decoder in this layout, and the nearest layouts that can."""
    work = layout_work(config)
    if not world_size or work is None or config.parallel.engine != "torch":
        return []
    return layout_and_model_problems(config.parallel, work, world_size)


def layout_work(config: RunConfig) -> Work | None:
    """Return the sizes that a layout must divide; None for a user's model without a decoder's keys."""
    keys: Any = config.model.keys if isinstance(config.model, CustomModel) else vars(config.model)
    shape: dict[str, int] = {
        name: keys[name] for name in ("layers", "heads", "kv_heads", "ffn_dim") if isinstance(keys.get(name), int)
    }
    if len(shape) < 4:
        return None
    return Work(
        **shape,
        vocabulary=config.model.vocabulary,
        seq_len=config.data.seq_len,
        micro=config.batch.largest_micro,
        activation=config.trainer.activation,
        compile=config.trainer.compile,
    )


def _optimizer_problems(config: RunConfig) -> list[Problem]:
    """Build the optimizer over one small parameter, to see whether it takes its keys."""
    parameter = NamedParameter("probe.weight", torch.nn.Parameter(torch.zeros(2, 2)), (2, 2))
    optimizer_factory(config.optim)([parameter], Unsharded())
    return []


def _model_problems(config: RunConfig) -> list[Problem]:
    """Return the problems of the model: its keys, its partition over ranks, its activation budget."""
    model = build_model(config.model, vocabulary=config.model.vocabulary or 2)
    found = model_problems(model, config.parallel, engine_settings(config))
    if found:
        return found
    if config.trainer.float8 != "none":
        tokens = config.batch.micro * config.data.seq_len // config.parallel.cp
        found += float8_size_problems(model.block_modules().values(), tokens)
    if config.trainer.activation_budget is not None:
        try:
            block_policies(decoder_shape(model), config.parallel, engine_settings(config))
        except ValueError as error:
            found.append(Problem("trainer.activation_budget", str(error), "give it more"))
    return found


def _schedule_problems(config: RunConfig) -> list[Problem]:
    return build_schedule(config.schedule, config.optim.lr, build_horizon(config, config.data.seq_len)).problems()


def _batch_problems(config: RunConfig) -> list[Problem]:
    """Return the problems of the batch-size controller in this run."""
    controller = build_controller(config.batch, build_horizon(config, config.data.seq_len))
    found = controller.problems()
    if controller.needs_statistics:
        if controller.least <= controller.micro:
            message = "a batch of one micro-batch has nothing to compare, so its noise would never be measured"
            found.append(Problem("batch.samples", message, "double it, or halve batch.micro"))
        tied = bool(getattr(config.model, "tied", False))
        found += measuring_problems(config.parallel, tied, controller.needs_projections)
    if config.optim.compares_halves():
        found += _halves_problems(config, controller)
    return found


def _halves_problems(config: RunConfig, controller: Controller) -> list[Problem]:
    """Return the problems that keep AGVM from comparing two halves of every batch."""
    found: list[Problem] = []
    if config.parallel.engine != "torch":
        fix = "use parallel.engine=torch, or another optimizer"
        found.append(Problem("optim", "AGVM compares halves of a batch's gradient, which DeepSpeed does not give", fix))
    if config.parallel.pp > 1:
        fix = "use parallel.pp=1, or another optimizer"
        found.append(Problem("optim", "AGVM compares halves of a batch's micro-batches, which a pipeline mixes", fix))
    if controller.least <= controller.micro:
        fix = "halve batch.micro, or double the smallest batch"
        found.append(Problem("batch.micro", "AGVM needs two micro-batches or more in every batch", fix))
    return found
