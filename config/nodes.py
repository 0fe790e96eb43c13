"""Build objects from nodes of the config: Meshloom's classes take their typed config, a user's class takes the keys."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .keys import not_a_key
from .problems import ConfigError, Problem
from .structured import structured


@dataclass(frozen=True)
class Custom:
    """Config of a user's own class, of which Meshloom knows only the path.

    path  of the class (`_target_`)
    keys  the other keys of its node

    A group's `Custom…` class also has the keys that are read of every option of the group.
    """

    path: str = not_a_key("")
    keys: dict[str, Any] = not_a_key({})


def import_object(path: str) -> Any:
    """Return the object at a dotted path: a module's class or function, or an attribute of one. Raises ImportError."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and module.startswith(error.name):  # not a failed import inside the module
                continue
            raise
        try:
            for name in parts[end:]:
                found = getattr(found, name)
        except AttributeError as error:
            raise ImportError(f"{path} can't be imported: {error}") from error
        return found
    raise ImportError(f"{path} can't be imported: No module named '{parts[0]}'")


def find_option(options: Iterable[type], path: str | None) -> type | None:
    """Return the option, a config dataclass, whose `_target_` is the path; None if the class is the user's own."""
    return next((kind for kind in options if cast(Any, kind)._target_ == path), None)


def typed_option(kind: type, values: Mapping[str, Any], key: str) -> Any:
    """Return plain values as their dataclass. Raises ConfigError, naming each key that it does not have, or the wrong type.

    key: the node's
    """
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ConfigError([Problem(f"{key}.{name}", "there is no such key", _near(name, known)) for name in unknown])
    try:
        return OmegaConf.to_object(OmegaConf.merge(structured(kind), dict(values)))
    except OmegaConfBaseException as error:
        name, message = error.full_key or "", str(error).splitlines()[0].rstrip(".")
        raise ConfigError([Problem(f"{key}.{name}" if name else key, message, "give a value of its type")]) from error


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    shown = [other for other in known if other not in ("_target_", "name")]
    return f"did you mean {near[0]}?" if near else f"the keys are {', '.join(shown)}"


def build(config: Any, *arguments: Any, leave_out: tuple[str, ...] = (), **live: Any) -> Any:
    """Build the object that a config describes.

    A class of Meshloom is called with the config and the positional and keyword arguments. A user's class is called with the
    keys of its node, without those in `leave_out`, and the keyword arguments.
    """
    if isinstance(config, Custom):
        return import_object(config.path)(**{key: value for key, value in config.keys.items() if key not in leave_out}, **live)
    return import_object(config._target_)(config, *arguments, **live)
