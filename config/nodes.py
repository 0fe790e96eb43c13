"""Nodes of the config that a class is built from: one of Meshloom's own takes its typed config, a user's own takes the keys."""

from __future__ import annotations

import importlib
from typing import Any


class Custom:
    """The config of a class of the user's own, which Meshloom knows by its path alone.

    path  the class's (`_target_`)
    keys  the rest of its node
    """

    path: str
    keys: dict[str, Any]


def import_object(path: str) -> Any:
    """Return what a dotted path names: a module's class or function, or an attribute of one. Raises ImportError."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and module.startswith(error.name):  # not one that this module imports in vain
                continue
            raise
        try:
            for name in parts[end:]:
                found = getattr(found, name)
        except AttributeError as error:
            raise ImportError(f"{path} can't be imported: {error}") from error
        return found
    raise ImportError(f"{path} can't be imported: No module named '{parts[0]}'")


def build(config: Any, *arguments: Any, leave_out: tuple[str, ...] = (), **live: Any) -> Any:
    """Build the object that a config describes.

    A class of Meshloom's own is called with the config and the positional and keyword arguments. One of the user's own is
    called with the keys of its node, but for `leave_out`, and the keyword arguments.
    """
    if isinstance(config, Custom):
        return import_object(config.path)(**{key: value for key, value in config.keys.items() if key not in leave_out}, **live)
    return import_object(config._target_)(config, *arguments, **live)
