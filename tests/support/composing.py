"""Compositions of configs that share what Hydra would do anew for each: it takes as long as most tests do besides."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

# Hydra has no public way to keep what it has parsed, read or merged for the next composition, so three methods of its private
# modules are replaced. Each stands here with the parameters that it takes: `share_compositions` asserts them, and a test in
# tests/config/test_compose.py asserts that Hydra calls each.
PARSE = (OverridesParser, "parse_rule", ["self", "s", "rule_name"])
"""Parses one word of a command line by a rule of the grammar."""
LOAD = (ConfigRepository, "load_config", ["self", "config_path"])
"""Reads one recipe, and its list of defaults."""
MERGE = (ConfigLoaderImpl, "_compose_config_from_defaults_list", ["self", "defaults", "repo"])
"""Merges the recipes of a list of defaults, before the command line's values are put in."""

_HYDRAS_OWN: dict[tuple[type, str], Any] = {}
"""The methods as they were before `share_compositions`."""


def share_compositions() -> None:
    """Have Hydra read each recipe, merge each choice of them and parse each override once in this process and its forks.

    Command lines that choose the same recipes start from copies of one merged config; their values are put in as ever. A
    user's folder is read anew each time, as its files may change. Raises AssertionError where Hydra has other methods.
    """
    parse, load, merge = (_method_of_hydra(*each) for each in (PARSE, LOAD, MERGE))
    for (owner, name, _), method in zip((PARSE, LOAD, MERGE), (parse, load, merge), strict=True):
        _HYDRAS_OWN.setdefault((owner, name), method)
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]  # nothing writes to the copy
    parsed, loaded, merged = dict[str, Override](), dict[Any, Any](), dict[Any, Any]()

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

    OverridesParser.parse_rule = parse_once  # type: ignore[method-assign]
    ConfigRepository.load_config = load_once  # type: ignore[method-assign]
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once  # type: ignore[method-assign]


def compose_anew() -> None:
    """Have Hydra read, merge and parse in this process as it does outside of tests, whatever earlier tests have composed."""
    for (owner, name), method in _HYDRAS_OWN.items():
        setattr(owner, name, method)


def _method_of_hydra(owner: type, name: str, parameters: list[str]) -> Callable[..., Any]:
    """Return a method of Hydra that is replaced here; it must be there and take these parameters."""
    method = getattr(owner, name, None)
    found = None if method is None else list(inspect.signature(method).parameters)
    assert method is not None and found == parameters, (
        f"Hydra {hydra.__version__}: {owner.__name__}.{name} should take {parameters}, and takes {found}; mend this file"
    )
    return method


def _sources(repo: Any) -> tuple[str, ...] | None:
    """Return where a repository reads; None if one of its places may change."""
    sources = repo.get_sources()
    return None if any(each.scheme() == "file" for each in sources) else tuple(each.full_path() for each in sources)
