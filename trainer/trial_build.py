"""Problems found only by building a run's objects: on the meta device and over small parameters, without their memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..config.nodes import Custom
from ..config.problems import Problem
from ..data.build import build_node
from ..models.protocol import decoder_shape, hidden_matrices
from ..optim.build import build_schedule
from ..optim.optimizers.config import OptimConfig
from ..optim.optimizers.eight_bit_config import AdamW8bitConfig
from ..optim.optimizers.frugal_config import FRUGALConfig
from ..optim.optimizers.matrix_config import MatrixOptimConfig
from ..optim.optimizers.parameters import NamedParameter, Unsharded
from ..parallel.capabilities import model_problems
from ..parallel.deepspeed.optimizer import optimizer_problems
from ..parallel.legality import layout_and_model_problems
from ..parallel.policies import block_policies
from ..parallel.torch.float8 import float8_size_problems
from ..planner.parameters import Inventory, decoder_inventory
from .build import build_model, optimizer_factory
from .derived import activation_settings, build_horizon
from .hooks.base import hook_problems
from .relations import Start, batch_problems, collect_problems, layout_work
from .schema import RunConfig


def build_problems(config: RunConfig, start: Start) -> list[Problem]:
    """Return the problems found by building a config without other problems."""
    world_size = start.world_size
    found = [*hook_problems(config.trainer.hooks)]
    if isinstance(config.data, Custom):
        found += collect_problems("data", lambda: build_node(config.data, config.seed, config.model.vocabulary).problems())
    optimizer = collect_problems("optim", lambda: _optimizer_problems(config))
    if not optimizer and world_size and config.parallel.engine == "deepspeed":
        optimizer = collect_problems("optim", lambda: optimizer_problems(optimizer_factory(config.optim)))
    found += optimizer
    found += collect_problems("model", lambda: _model_problems(config, world_size))
    if isinstance(config.schedule, Custom):
        found += collect_problems("schedule", lambda: _schedule_problems(config, start))
    if isinstance(config.batch, Custom):
        found += collect_problems("batch", lambda: batch_problems(config, start.place))
    return found


def _optimizer_problems(config: RunConfig) -> list[Problem]:
    """Build the optimizer over two small parameters, to see whether it takes its keys, and has the groups that engines need."""
    matrix = NamedParameter("probe.weight", torch.nn.Parameter(torch.zeros(2, 2)), (2, 2))
    vector = NamedParameter("probe.bias", torch.nn.Parameter(torch.zeros(2)), (2,), decay=False)
    optimizer = optimizer_factory(config.optim)([matrix, vector], Unsharded())
    return [*optimizer_group_problems(optimizer, [matrix, vector])]


def optimizer_group_problems(optimizer: object, parameters: Sequence[NamedParameter]) -> Iterator[Problem]:
    """Yield what keeps an engine from driving an optimizer: see `optim/optimizers/parameters.py`."""
    name = type(optimizer).__name__
    fix = "give torch.optim.Optimizer the groups of decay_groups(parameters, weight_decay) (optim/optimizers/parameters.py)"
    if not isinstance(optimizer, torch.optim.Optimizer):
        yield Problem("optim", f"{name} is no torch.optim.Optimizer", "derive it from torch.optim.Optimizer")
        return
    groups = optimizer.param_groups
    if any("lr_scale" not in group for group in groups):
        yield Problem("optim", f"{name} has a parameter group without 'lr_scale', by which engines set its rate", fix)
    held = {id(tensor) for group in groups for tensor in group["params"]}
    if left := [parameter.name for parameter in parameters if id(parameter.tensor) not in held]:
        yield Problem("optim", f"{name} has {', '.join(left)} in no parameter group, and would not train it", fix)


def _block_problems(optim: OptimConfig, model: Inventory, tp: int) -> list[Problem]:
    """Return the problem of blocks of columns that tensor parallelism would cut; at most one."""
    if isinstance(optim, AdamW8bitConfig):
        key, block = "block", optim.block
        blocked = (each for each in model.parameters if each.numel >= optim.min_size)
    elif isinstance(optim, FRUGALConfig):
        key, block = "period", optim.period
        blocked = (each for each in model.parameters if each.hidden)
    else:
        return []
    for each in blocked:
        if tp > 1 and each.cut_dim == 1 and (columns := each.local_shape(tp)[1]) % block:
            message = f"{block} does not divide the {columns} columns that a rank has of {each.name}"
            return [Problem(f"optim.{key}", message, f"choose a smaller {key}, or another parallel.tp")]
    return []


def _model_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Return the problems of the model: its keys, its partition over ranks, its activation budget."""
    model = build_model(config.model, vocabulary=config.model.vocabulary or 2)
    found = model_problems(model, config.parallel, activation_settings(config))
    if isinstance(config.optim, MatrixOptimConfig) and not hidden_matrices(model):
        message = f"{config.optim.name} updates the matrices of blocks, and {type(model).__name__} has none"
        found.append(Problem("optim", message, "use optim=adamw, or keep the model's blocks in a ModuleList"))
    if isinstance(config.optim, MatrixOptimConfig) and config.parallel.offload != "none":
        message = f"{config.optim.name} computes whole matrices on the GPU, where offloaded shards are not"
        found.append(Problem("parallel.offload", message, "use none, or optim=adamw"))
    if model.decoder_config is not None:
        found += _block_problems(config.optim, decoder_inventory(model.decoder_config), config.parallel.tp)
    shape = model.decoder_config
    if shape is not None and config.model.decoder() is None and world_size and config.parallel.engine == "torch":
        # Its keys did not tell that it is a decoder. Its vocabulary here may be a stand-in.
        work = replace(layout_work(config, shape), vocabulary=config.model.vocabulary)
        found += layout_and_model_problems(config.parallel, work, world_size)
    if found:
        return found
    if config.trainer.float8 != "none":
        tokens = config.batch.micro_size * config.data.seq_len // config.parallel.cp
        found += float8_size_problems(model.block_modules().values(), tokens)
    if config.trainer.activation_budget is not None:
        try:
            block_policies(decoder_shape(model), config.parallel, activation_settings(config))
        except ValueError as error:
            found.append(Problem("trainer.activation_budget", str(error), "give it more"))
    return found


def _schedule_problems(config: RunConfig, start: Start) -> list[Problem]:
    horizon = build_horizon(config, config.data.seq_len, start.progress, start.place)
    return build_schedule(config.schedule, config.optim.lr, horizon).problems()
