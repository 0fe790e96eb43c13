"""Compositions of configs that share what Hydra would do anew for each: it takes as long as most tests do besides."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hydra
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from meshloom.config.problems import Problem
from meshloom.trainer import typed

# Hydra has no public way to keep what it has parsed, read, chosen or merged for the next composition, so three methods and a
# function of its private modules are replaced. Each stands here with the parameters that it takes: `share_compositions` asserts
# them, and a test in tests/config/test_compose.py asserts that Hydra calls each.
PARSE = (OverridesParser, "parse_rule", ["self", "s", "rule_name"])
"""Parses one word of a command line by a rule of the grammar."""
LOAD = (ConfigRepository, "load_config", ["self", "config_path"])
"""Reads one recipe, and its list of defaults."""
CHOOSE = (
    config_loader_impl,
    "create_defaults_list",
    ["repo", "config_name", "overrides_list", "prepend_hydra", "skip_missing"],
)
"""Finds the recipes that a command line chooses, in the order in which they are merged."""
MERGE = (ConfigLoaderImpl, "_compose_config_from_defaults_list", ["self", "defaults", "repo"])
"""Merges the recipes of a list of defaults, before the command line's values are put in."""

TYPE = (typed, "_typed_node", ["group", "node", "problems"])
"""Meshloom's own: converts the node of a group to its dataclass, through OmegaConf's checks of types."""

_BEFORE: dict[tuple[Any, str], Any] = {}
"""The methods and functions as they were before `share_compositions`."""


def share_compositions() -> None:
    """Have Hydra read each recipe, merge each choice of them and parse each override once in this process and its forks.

    Command lines that choose the same recipes start from copies of one merged config; their values are put in as ever. A
    user's folder is read anew each time, as its files may change. A node of the same values is converted once, too. Raises
    AssertionError where Hydra has other methods.
    """
    replaced = (PARSE, LOAD, CHOOSE, MERGE, TYPE)
    parse, load, choose, merge, convert = (_existing(*each) for each in replaced)
    for (owner, name, _), method in zip(replaced, (parse, load, choose, merge, convert), strict=True):
        _BEFORE.setdefault((owner, name), method)
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]  # nothing writes to the copy
    parsed, loaded, merged = dict[str, Override](), dict[Any, Any](), dict[Any, Any]()
    chosen, converted = dict[Any, Any](), dict[Any, Any]()

    def parse_once(self: OverridesParser, s: str, rule_name: str) -> Any:
        if rule_name != "override":
            return parse(self, s, rule_name)
        if s not in parsed:
            parsed[s] = parse(self, s, rule_name)
        return copy.copy(parsed[s])

    def load_once(self: ConfigRepository, config_path: str) -> Any:
        key = _sources(self)
        if key is None:
            return load(self, config_path)
        if (key, config_path) not in loaded:
            loaded[key, config_path] = load(self, config_path)
        return loaded[key, config_path]

    def choose_once(
        repo: Any, config_name: str | None, overrides_list: list[Override], prepend_hydra: bool, skip_missing: bool
    ) -> Any:
        values, choices = list[Override](), list[Override]()
        for each in overrides_list:
            (values if not each.is_sweep_override() and _is_value(each, repo) else choices).append(each)
        sources = _sources(repo)
        if sources is None:
            return choose(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        key = (sources, config_name, tuple(each.input_line for each in choices), prepend_hydra, skip_missing)
        if key not in chosen:
            chosen[key] = choose(repo, config_name, choices, prepend_hydra, skip_missing)
        return replace(chosen[key], config_overrides=values)

    def merge_once(self: ConfigLoaderImpl, defaults: Any, repo: Any) -> Any:
        sources = _sources(repo)
        if sources is None:
            return merge(self, defaults, repo)
        key = (sources, tuple(map(repr, defaults)))
        if key not in merged:
            fresh = CachingConfigRepository(repo.delegate)  # the merged config takes the nodes that are read here
            fresh.delegate.load_config = load.__get__(fresh.delegate)  # type: ignore[method-assign]
            merged[key] = merge(self, defaults, fresh)
        return copy.deepcopy(merged[key])

    def convert_once(group: str, node: dict[str, Any], problems: list[Problem]) -> Any:
        key = (group, repr(node))
        if key in converted:
            return copy.deepcopy(converted[key])
        before = len(problems)
        found = convert(group, node, problems)
        if len(problems) == before:
            converted[key] = copy.deepcopy(found)
        return found

    OverridesParser.parse_rule = parse_once  # type: ignore[method-assign]
    ConfigRepository.load_config = load_once  # type: ignore[method-assign]
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once  # type: ignore[method-assign]
    config_loader_impl.create_defaults_list = choose_once
    typed._typed_node = convert_once


def compose_anew() -> None:
    """Have this process compose as it does outside of tests, whatever earlier tests have composed."""
    for (owner, name), method in _BEFORE.items():
        setattr(owner, name, method)


def _existing(owner: Any, name: str, parameters: list[str]) -> Callable[..., Any]:
    """Return a method or function that is replaced here; it must be there and take these parameters."""
    method = getattr(owner, name, None)
    found = None if method is None else list(inspect.signature(method).parameters)
    assert method is not None and found == parameters, (
        f"Hydra {hydra.__version__}: {owner.__name__}.{name} should take {parameters}, and takes {found}; mend this file"
    )
    return method


def _is_value(override: Override, repo: Any) -> bool:
    """Return whether an override gives a value, as Hydra sees it, and chooses no recipe."""
    return isinstance(override.value(), dict) or not repo.group_exists(override.key_or_group)


def _sources(repo: Any) -> tuple[str, ...] | None:
    """Return where a repository reads; None if one of its places may change."""
    sources = repo.get_sources()
    return None if any(each.scheme() == "file" for each in sources) else tuple(each.full_path() for each in sources)
