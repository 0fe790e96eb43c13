"""Schemas for OmegaConf, made of config dataclasses, and values that it leaves as they are."""

from __future__ import annotations

import re
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf


def structured(kind: type, **flags: bool) -> DictConfig:
    """Return the schema of a config dataclass, into which values can be merged.

    A config dataclass is frozen, for which OmegaConf makes its nodes read-only: here they are not. flags: of the schema.
    """
    schema = cast(DictConfig, OmegaConf.structured(kind, flags=dict(flags)))
    _make_writable(schema)
    return schema


def _make_writable(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, None)
    inner: list[Any] = [value for _, value in node.items_ex(resolve=False)]
    for value in inner:
        if isinstance(value, DictConfig) and not value._is_missing() and not value._is_none():
            _make_writable(value)


def literal(tree: Any) -> Any:
    """Return plain containers in which no text is an interpolation: `${…}` of a checkpoint stays text."""
    if isinstance(tree, dict):
        return {key: literal(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [literal(value) for value in tree]
    return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", tree) if isinstance(tree, str) else tree
