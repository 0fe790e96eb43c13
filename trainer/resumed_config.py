"""Config of a resumed run: the checkpoint's recipe and habits, today's placement, and the typed overrides on top."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ..config.compose import drop_unknown, normalize_override
from ..config.keys import MISSING, Side, keys_of
from ..config.renames import with_moved_targets, with_renamed_keys
from .schema import OPTIONS, RunConfig
from .sides import key_sides
from .typed import option_of, typed_config

UNREPORTED = ("output_dir", "resume")  # placement that every resume may change
ABSENT = object()


def saved_config(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config saved in a checkpoint, under the current names."""
    return with_renamed_keys(with_moved_targets(copy.deepcopy(state.get("config") or {})))


def saved_choices(saved: Mapping[str, Any], fresh: DictConfig, overrides: Iterable[str], recipes: Collection[str]) -> list[str]:
    """Return overrides that choose the checkpoint's recipe, and its option for each group, where the command line names none.

    With them the command line is composed and checked against the options that the resumed run has, and placement comes from
    the file of the run's own recipe.

    recipes: the names of those that can be chosen today
    """
    typed = {key for key, _ in _typed(overrides)}
    if "recipe" in typed and fresh.get("recipe") != saved.get("recipe"):
        return []
    found: list[str] = []
    if "recipe" not in typed and saved.get("recipe") != fresh.get("recipe") and saved.get("recipe") in recipes:
        found.append(f"recipe={saved['recipe']}")
    for group in OPTIONS:
        node: dict[str, Any] = saved.get(group) or {}
        kind = option_of(group, node)
        if group != "model" and kind is not None and group not in typed and fresh[group].get("_target_") != node["_target_"]:
            found.append(f"{group}={cast(Any, kind).name}")
    return found


def resume_config(saved: Mapping[str, Any], fresh: DictConfig, overrides: Iterable[str]) -> tuple[DictConfig, list[str]]:
    """Return the config of a run that resumes from a checkpoint, and notices about it.

    A typed recipe other than the saved one replaces the saved config. Choosing the option that the checkpoint has changes
    nothing.

    saved: the checkpoint's config; fresh: the composition of this command line; overrides: its words
    """
    today = cast(dict[str, Any], OmegaConf.to_container(fresh, resolve=True, throw_on_missing=False))
    typed = dict(_typed(overrides))
    if "recipe" in typed and today["recipe"] != saved.get("recipe"):
        return fresh, [f"this run has the recipe {today['recipe']} from now on (it was {saved.get('recipe')})"]
    merged: dict[str, Any] = copy.deepcopy(dict(saved))
    for key, value in typed.items():
        chooses = key in OPTIONS and isinstance(value, str)
        if key != "recipe" and not (chooses and key != "model" and _same_option(merged.get(key), today[key])):
            _put(merged, key, _at(today, key))
    merged, dropped = _known(merged)
    sides = key_sides(typed_config(_schema(merged))[0])
    for key, side in sides.items():
        if side is Side.PLACEMENT and not _is_typed(key, typed):
            _put(merged, key, _placed(key, _at(today, key), _at(merged, key)))
    told = [
        *(f"{key} is no key of this version, and is left out" for key in dropped),
        *_changes(saved, merged, sides, Side.RECIPE, "changed recipe"),
        *_changes(saved, merged, sides, Side.PLACEMENT, "changed placement"),
        *_kept(saved, today, merged, sides),
    ]
    return _schema(merged), told


def _typed(overrides: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for override in OverridesParser.create().parse_overrides([normalize_override(line) for line in overrides]):
        if not override.is_hydra_override():
            yield override.package or override.key_or_group, override.value()


def _is_typed(key: str, typed: Mapping[str, Any]) -> bool:
    """Return whether a key, or a node that contains it, was typed. Choosing a group's option does not type its keys."""
    return any(key == given or (key.startswith(f"{given}.") and given not in OPTIONS) for given in typed)


def _same_option(saved: Any, fresh: Any) -> bool:
    return isinstance(saved, dict) and all(saved.get(key) == fresh.get(key) for key in ("_target_", "name"))


def _placed(key: str, now: Any, before: Any) -> Any:
    """Return the value of a placement key: today's; for data that today's command line does not place, the checkpoint's."""
    if now is ABSENT or now == MISSING or (now is None and key.startswith("data.")):
        return before if key.startswith("data.") else ABSENT
    return now


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return ABSENT
        tree = tree[name]
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a key; with ABSENT, delete it, which leaves its default."""
    *groups, name = key.split(".")
    for group in groups:
        if not isinstance(tree.get(group), dict):
            tree[group] = {}
        tree = tree[group]
    if value is ABSENT:
        tree.pop(name, None)
    else:
        tree[name] = copy.deepcopy(value)


def _known(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the config without keys that this version does not have, and the names of these."""
    config: Any = OmegaConf.create(tree)
    dropped = drop_unknown(config)
    tree = cast(dict[str, Any], OmegaConf.to_container(config))
    for group in OPTIONS:
        kind = option_of(group, tree[group])
        known = {key.name for key in keys_of(kind)} if kind is not None else set(tree[group])
        for name in [name for name in tree[group] if name not in known]:
            del tree[group][name]
            dropped.append(f"{group}.{name}")
    return tree, dropped


def _schema(tree: dict[str, Any]) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(OmegaConf.structured(RunConfig), tree))


def _changes(
    saved: Mapping[str, Any], merged: dict[str, Any], sides: Mapping[str, Side], side: Side, head: str
) -> Iterator[str]:
    """Yield one line with the keys of a side whose values differ from the checkpoint's, if any do."""
    said: list[str] = []
    for key in (key for key, its in sides.items() if its is side and key not in UNREPORTED and not key.endswith("._target_")):
        before, now = _at(dict(saved), key), _at(merged, key)
        if before != now and ABSENT not in (before, now):
            said.append(f"{key}={_written(now)} (was {_written(before)})")
    if said:
        yield f"{head}: {', '.join(said)}"


def _kept(saved: Mapping[str, Any], today: dict[str, Any], merged: dict[str, Any], sides: Mapping[str, Side]) -> Iterator[str]:
    """Yield a line for each key where the recipe files differ from the checkpoint, whose value is kept."""
    for key, side in sides.items():
        now, kept = _at(today, key), _at(merged, key)
        if side is not Side.PLACEMENT and now is not ABSENT and now != kept and kept == _at(dict(saved), key):
            yield f"resumed run keeps {key}={_written(kept)} (the recipe now says {_written(now)})"


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
