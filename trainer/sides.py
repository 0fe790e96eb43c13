"""The side of every key of a run: see `config/keys.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import yaml

from ..config.keys import RecipeWhen, Side, keys_of
from ..config.nodes import Custom
from .schema import RunConfig, groups
from .typed import option_of, plain_config

LEGEND = (
    "# recipe: what is computed; a resumed run takes it from its checkpoint, with the command line on top",
    "# placement: where and how; always today's",
    "# habit: kept from the checkpoint until another is typed",
)


def key_sides(config: RunConfig) -> dict[str, Side]:
    """Return key → side for every key of this run. Keys of a user's own class are recipe."""
    own = {field.name for field in dataclasses.fields(RunConfig) if field.metadata}
    found = {key.name: _side(key.side, config) for key in keys_of(RunConfig, only=own)}
    for group in filter(None, groups()):
        node = vars(config)[group]
        if isinstance(node, Custom):
            found |= {f"{group}.{name}": Side.RECIPE for name in node.keys}
        if dataclasses.is_dataclass(node):
            found |= {f"{group}.{key.name}": _side(key.side, config) for key in keys_of(type(node))}
    found |= dict(_source_sides(config))
    return found


def _source_sides(config: RunConfig) -> Iterator[tuple[str, Side]]:
    """Yield key → side for the sources of a mixture, and for named validation sets: they are nodes of the group data."""
    nodes = {f"validation.{name}": node for name, node in config.validation.items()}
    if "data" not in config.unusable:
        nodes |= {f"data.sources.{name}": node for name, node in config.data.nested.items()}
    for name, node in nodes.items():
        kind = option_of("data", node) if isinstance(node, dict) else None
        if kind is not None:
            yield from ((f"{name}.{key.name}", _side(key.side, config)) for key in keys_of(kind) if key.name in node)


def _side(declared: Side | RecipeWhen, config: RunConfig) -> Side:
    if isinstance(declared, Side):
        return declared
    return Side.RECIPE if config.unusable else declared.of(config)  # such a run is refused, whatever the side


def annotated_yaml(config: RunConfig) -> str:
    """Return the whole config as YAML, each key with its side as a comment."""
    return "\n".join([*LEGEND, *_annotated(plain_config(config), key_sides(config))]) + "\n"


def _annotated(tree: dict[str, Any], sides: dict[str, Side], prefix: str = "", indent: str = "") -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in sides and isinstance(value, dict):
            yield f"{indent}{_inline(name)}:"
            yield from _annotated(value, sides, f"{key}.", f"{indent}  ")
            continue
        side = f"  # {sides[key]}" if key in sides else ""
        yield f"{indent}{_inline(name)}: {_inline(value)}{side}"


def _inline(value: Any) -> str:
    """Write a value as YAML in one line."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=1 << 20).strip()[1:-1]
