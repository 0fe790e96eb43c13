"""Schemas of the options of each group: which keys an option has, and which values a recipe wrote for another one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .fixes import unknown_key
from .keys import MISSING, field_of
from .problems import Problem
from .tree import delete_key, run_schema


class GroupSchemas:
    """The dataclasses of all groups with options, and that of the whole config."""

    def __init__(self, options: Mapping[str, Sequence[type]]) -> None:
        """options: group → the schemas of its options."""
        self._options = options
        self.run = run_schema()

    def __contains__(self, group: str) -> bool:
        return group in self._options

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def declares(self, key: str, config: DictConfig) -> bool:
        """Return whether a key is declared, in this config. A node of a user's own class declares none."""
        group, _, inner = key.partition(".")
        if group not in self:
            return field_of(self.run, key) is not None
        schema = self._schema_of(group, config.get(group))
        return not inner or (schema is not None and field_of(schema, inner) is not None)

    def default_fix(self, key: str, options: Sequence[str]) -> str:
        """Word the fix for a key that can't be deleted: its default, or of a group another of its `options`."""
        group, _, inner = key.partition(".")
        if group in self and not inner:
            return f"choose another option: {group}={', '.join(options)}"
        kinds, name = (self._options[group], inner) if group in self else ([self.run], key)
        declared = [field for kind in kinds if (field := field_of(kind, name)) is not None]
        defaults = {json.dumps(field.default) for field in declared if isinstance(field.default, str | int | float | None)}
        default = defaults.pop().strip('"') if len(defaults) == 1 else MISSING  # options differ
        return "give it another value" if default == MISSING else f"write {key}={default}, its default"

    def leave_out(self, group: str, config: DictConfig, typed: Collection[str]) -> tuple[list[Problem], list[str]]:
        """Remove keys of a group that its option does not have. Return problems and notices.

        A notice for a key of another option that a recipe file gives; a problem for one that is typed, or that no option has.
        """
        problems, notices = list[Problem](), list[str]()
        schema = self._schema_of(group, config[group])
        if schema is None:  # a user's own class
            return problems, notices
        known = _names(schema)
        for name in [str(name) for name in config[group] if name not in known]:
            key = f"{group}.{name}"
            owners = [str(_default(kind, "name")) for kind in self._options[group] if name in _names(kind)]
            here = f"{group}={_default(schema, 'name')}"
            if not owners:
                shown = [f"{group}.{other}" for other in known if not other.startswith("_") and other != "name"]
                problems.append(unknown_key(key, [group, *shown]))
            elif key in typed:
                fix = f"leave it out, or choose {' or '.join(f'{group}={owner}' for owner in owners[:3])}"
                problems.append(Problem(key, f"{here} has no such key", fix))
            else:
                others = ", ".join(f"{group}={owner}" for owner in owners[:3])
                notices.append(f"{key} of the recipe is left out: {here} has no such key ({others} has)")
            delete_key(config, key)
        return problems, notices

    def changed_keys(self, group: str, node: Any, typed: Collection[str]) -> list[str]:
        """Return the names of keys to which a recipe, not the command line, gave another value than the option's default.

        Only keys whose defaults tell the options apart are meant, such as the learning rate of an optimizer.
        """
        schema = self._schema_of(group, node)
        if schema is None:
            return []
        names = [name for name in _names(schema) if name in node and name not in ("_target_", "name")]
        names = [name for name in names if f"{group}.{name}" not in typed and self._tells_apart(group, name)]
        return [name for name in names if node[name] != _default(schema, name)]

    def written_for_another(self, group: str, node: Any, base: Any, changed: Sequence[str]) -> Iterator[str]:
        """Yield a notice for each changed key whose value the recipe wrote for its own option of the group.

        node, base: of the group, with the option that was typed and with the recipe's own
        """
        schema, other = self._schema_of(group, node), self._schema_of(group, base)
        if schema is None or other is None or other is schema:
            return
        for name in changed:
            own = _default(schema, name)
            if base.get(name) == node[name] and own != _default(other, name):
                here, there = (f"{group}={_default(kind, 'name')}" for kind in (schema, other))
                yield f"{group}.{name}={node[name]} was written for {there}; {here} has {group}.{name}={own} of its own"

    def _schema_of(self, group: str, node: Any) -> type | None:
        """Return the schema of a node's option; None for a user's own class."""
        # As plain containers: `_target_` may be an interpolation that can't be resolved.
        path: Any = OmegaConf.to_container(node) if isinstance(node, DictConfig) else {}
        return next((kind for kind in self._options[group] if _default(kind, "_target_") == path.get("_target_")), None)

    def _tells_apart(self, group: str, name: str) -> bool:
        return len({str(_default(kind, name)) for kind in self._options[group] if name in _names(kind)}) > 1


def _names(kind: type) -> list[str]:
    return [one.name for one in dataclasses.fields(kind)]


def _default(kind: type, name: str) -> Any:
    return next((one.default for one in dataclasses.fields(kind) if one.name == name), None)
