"""The classes that a saved config names. Whoever wrote a checkpoint must not choose what code runs here.

From a checkpoint only the classes that Meshloom's own options register count, by their exact names, each in its group. A class
of a user's own counts where today's recipe or command line names it in the same place. A node inside another node never counts,
unless today's words give it just so.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

from ..config.nodes import find_option
from ..config.overrides import quoted
from ..config.problems import ConfigError, Problem
from .schema import OPTIONS

Path = tuple[str | int, ...]
HOOKS = ("trainer", "hooks")
OWN_PACKAGES = ("meshloom", "hydra", "omegaconf")
REACHES_ALL = frozenset({"os", "sys", "subprocess", "shutil", "builtins", "importlib", "runpy", "pickle", "ctypes"})
"""Modules of Python's that other modules have among their attributes, as in `torch.os.system`."""


def refuse_unnamed_classes(saved: Mapping[str, Any], today: Mapping[str, Any]) -> None:
    """Raise ConfigError if a saved config names a class that is neither an option of Meshloom's nor named by today's words.

    saved: with the typed overrides on top; today: the config of today's command line and recipe files
    """
    problems = [_problem(path, node, saved) for path, node in unnamed_nodes(saved, today)]
    if problems:
        raise ConfigError(problems)


def unnamed_nodes(saved: Mapping[str, Any], today: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield path and node of each class of a saved config that is no option of Meshloom's and not named by today's words."""
    yield from ((path, node) for path, node in _nodes(saved) if not _is_known(path, node, today))


def _nodes(tree: Any, path: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every node with a `_target_`, and its path."""
    if isinstance(tree, Mapping):
        if "_target_" in tree:
            yield path, dict(tree)
        for key, value in tree.items():
            yield from _nodes(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _nodes(value, (*path, index))


def _is_known(path: Path, node: dict[str, Any], today: Mapping[str, Any]) -> bool:
    group = _group(path)
    if group is not None and isinstance(node["_target_"], str) and find_option(OPTIONS[group], node["_target_"]) is not None:
        return True
    if path[:2] == HOOKS:
        hooks = _at(today, HOOKS) or []
        if len(path) == 3:
            return any(isinstance(hook, Mapping) and hook.get("_target_") == node["_target_"] for hook in hooks)
        return any(_at(hook, path[3:]) == node for hook in hooks)
    named = _at(today, path)
    return named == node or (group is not None and isinstance(named, Mapping) and named.get("_target_") == node["_target_"])


def _group(path: Path) -> str | None:
    """Return the group of a node that is an option of one: its only node, a source of a mixture, or a named validation set."""
    if len(path) == 1 and path[0] in OPTIONS:
        return str(path[0])
    is_data = (len(path) == 3 and path[:2] == ("data", "sources")) or (len(path) == 2 and path[0] == "validation")
    return "data" if is_data else None


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        if isinstance(tree, list) and isinstance(key, int) and key < len(cast(list[Any], tree)):
            tree = cast(list[Any], tree)[key]
        elif isinstance(tree, Mapping) and key in tree:
            tree = cast(Mapping[Any, Any], tree)[key]
        else:
            return None
    return tree


def _written(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_][\w./-]*", value) else quoted(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _problem(path: Path, node: dict[str, Any], saved: Mapping[str, Any]) -> Problem:
    """Return the problem of a class that nobody named today.

    What to type is told only where Meshloom builds a user's class, and of none that is no user's own.
    """
    key = ".".join(map(str, path))
    message = f"the checkpoint names the class {node['_target_']!r}, which today's command line and recipe don't"
    if not all(map(may_be_a_users, _targets(node))):
        return Problem(key, message, "that is no class for a run: don't trust this checkpoint")
    if path[:2] == HOOKS:
        hooks = _at(saved, HOOKS)
        if not all(map(may_be_a_users, _targets(hooks))):
            return Problem(key, message, "type trainer.hooks=[] to go on without hooks")
        return Problem(key, message, f"if it is yours, type {_typed('trainer.hooks', hooks)}, or else =[]")
    if _group(path) is not None:
        fix = f"if it is yours, type {_typed(f'{key}._target_', node['_target_'])}"
        return Problem(key, message, f"{fix}, or choose an option as {path[0]}=…" if path[0] in OPTIONS else fix)
    return Problem(key, message, "if it is yours, name it there in a recipe file of today (--config-dir)")


def _typed(key: str, value: Any) -> str:
    """Return a word of the command line, quoted for a shell."""
    return shlex.quote(f"{key}={_written(value)}")


def _targets(tree: Any) -> Iterator[Any]:
    """Yield what every `_target_` in a tree names."""
    return (node["_target_"] for _, node in _nodes(tree))


def may_be_a_users(target: Any) -> bool:
    """Return whether a name may be that of a user's own class: of a package that is not Python's, Hydra's or Meshloom's."""
    if not isinstance(target, str):
        return False
    package, *inner = target.split(".")
    return package not in {*sys.stdlib_module_names, *OWN_PACKAGES} and REACHES_ALL.isdisjoint(inner)
