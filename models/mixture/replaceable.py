"""The parts of a mixture that `model.experts` chooses: Meshloom's own by name, a user's by `_target_`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...config.nodes import Custom, build, import_object
from .config import MixtureConfig
from .dispatch import Combine, Dispatch, LocalJourney, combine
from .grouped import Product, grouped_product
from .recurrent import RecurrentRouter
from .relu import ReluRouter
from .router import Router, TopKRouter

ROUTERS: dict[str, Callable[[MixtureConfig], Router]] = {"top_k": TopKRouter, "recurrent": RecurrentRouter, "relu": ReluRouter}
"""`model.experts.router` → the router. A new one is listed here, and in `config.ROUTERS`."""


def make_router(config: MixtureConfig) -> Router:
    """Make a layer's router. Raises TypeError for a class of the user's own that is none."""
    node = config.keys.parts.node("router")
    if node is None:
        return ROUTERS[config.keys.router](config)
    made = import_object(node.path)(config, **node.keys)
    if not isinstance(made, Router):
        raise TypeError(f"model.experts.parts.router: {node.path} is no meshloom.models.mixture.router.Router")
    return made


def make_dispatch(config: MixtureConfig) -> Dispatch:
    """Make what begins the way of tokens to their experts."""
    return LocalJourney if (node := config.keys.parts.node("dispatch")) is None else _callable("dispatch", node)


def make_product(config: MixtureConfig) -> Product:
    """Make what multiplies each expert's rows with its matrix."""
    return grouped_product if (node := config.keys.parts.node("product")) is None else _callable("product", node)


def make_combine(config: MixtureConfig) -> Combine:
    """Make what sums the outputs of a token's experts."""
    return combine if (node := config.keys.parts.node("combine")) is None else _callable("combine", node)


def _callable(name: str, node: Custom) -> Any:
    made = build(node)
    if not callable(made):
        raise TypeError(f"model.experts.parts.{name}: {node.path} makes nothing that can be called")
    return made
