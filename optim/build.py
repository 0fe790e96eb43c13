"""From a config node to the object it describes: `_target_` called with the node's keys and the run's live objects.

A user's own class joins by its `_target_`; it is called with exactly the keys of its node (but for those named below,
which belong to the trainer) and the live objects.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from .batch.controller import Controller
from .horizon import Horizon
from .optimizers.agvm import AGVM
from .optimizers.parameters import NamedParameter, Shards
from .schedules.schedule import Schedule


def _call(node: Any, not_the_targets: tuple[str, ...], **live: Any) -> Any:
    fields: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    settings = {key: value for key, value in fields.items() if key not in not_the_targets}
    # partial, because Hydra would turn live objects that are dataclasses into configs
    factory = instantiate({**settings, "_partial_": True}, _convert_="all")
    return factory(**live)


def build_schedule(node: Any, peak: float, horizon: Horizon) -> Schedule:
    """The schedule of `config.schedule`. Ask its `problems()` before using it."""
    return _call(node, ("name",), peak=peak, horizon=horizon)


def build_optimizer(node: Any, parameters: Sequence[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
    """The optimizer of `config.optim` over this rank's shards."""
    return _call(node, ("name", "lr_coupling"), parameters=parameters, shards=shards)


def compares_halves(node: Any) -> bool:
    """Whether the optimizer of `config.optim` compares the gradients of two halves of a batch."""
    optimizer = get_object(node["_target_"])
    return inspect.isclass(optimizer) and issubclass(optimizer, AGVM)


def build_controller(node: Any, horizon: Horizon, divisor: int) -> Controller:
    """The batch-size controller of `config.batch`. divisor: batch.micro × data-parallel size. Ask its `problems()` first."""
    grows = {} if node.get("micro_max") is None else {"micro_growth": node["micro_max"] / node["micro"]}
    return _call(node, ("name", "micro", "micro_max"), horizon=horizon, divisor=divisor, **grows)
