"""Config of a resumed run: the checkpoint's recipe and habits, today's placement, and the typed overrides on top."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ..config.compose import Composition
from ..config.keys import MISSING, Side, keys_of
from ..config.overrides import normalize_override
from ..config.renames import FORMER_VALUES, with_moved_targets, with_renamed_keys
from ..config.structured import literal, with_declared_keys
from ..config.tree import drop_unknown
from ..optim.batch.config import FITTED, MICRO_SIDE
from .saved_classes import refuse_unnamed_classes
from .schema import OPTIONS, groups, run_schema
from .sides import key_sides
from .typed import option_of, typed_config

MICRO = "batch.micro"
UNREPORTED = ("output_dir", "resume")  # placement that every resume may change
ABSENT = object()
CONSEQUENCES = {
    "seed": "the data comes in another order from here on: samples that were seen may come again, and others never come",
    "data": "the run goes on at the same sample number of other data",
    "model": "the weights were trained with the earlier value",
}
"""Key or group → what a person should know who changes it on a resume. Such a change is a warning."""
HARMLESS = frozenset({"data.tokenizer", "data.markup", "model.init_std"})
"""Keys of these groups without such a consequence: a tokenizer is compared by its fingerprint, markup changes no document, and
the initial weights have been drawn."""


class KeptNotice(str):
    """A notice of values that are the checkpoint's although recipe files of today differ. A command may leave it out."""


@dataclass(frozen=True)
class Resumed:
    """The config of a resumed run, and what to say about it.

    config    the checkpoint's, today's and the typed values together
    notices   what was changed or kept, by key
    warnings  changes that may be mistakes, by key
    choices   group → its option, as far as that is known
    """

    config: DictConfig
    notices: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])
    choices: dict[str, str] = field(default_factory=dict[str, str])


def saved_config(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config saved in a checkpoint, under the current names, with the former values of keys that it lacks."""
    found = with_renamed_keys(with_moved_targets(copy.deepcopy(state.get("config") or {})))
    for key, value in FORMER_VALUES.items():
        group, name = key.split(".")
        kind = option_of(group, found[group]) if group in found else None
        if kind is not None and name in {each.name for each in keys_of(kind)}:
            found[group].setdefault(name, value)
    return {name: _with_declared_keys(name, value) for name, value in found.items()}


def _with_declared_keys(name: str, value: Any) -> Any:
    """Return the value of a group with keys of mappings as they are declared: JSON keeps numbers of machines as text."""
    if not isinstance(value, Mapping):
        return value
    node = cast(Mapping[str, Any], value)
    kind = option_of(name, node) if name in OPTIONS else groups().get(name, (None,))[0]
    return node if kind is None else with_declared_keys(kind, node)


def saved_islands(state: Mapping[str, Any]) -> int:
    """Return how many islands (`optim.local`) a checkpoint is of; 1 for an import, and for runs that knew none."""
    return state.get("islands", recipe_islands(state))


def recipe_islands(state: Mapping[str, Any]) -> int:
    """Return how many islands the recipe of a checkpoint's run asks for, of which some may have been lost."""
    optim = (state.get("config") or {}).get("optim") or {}
    return (optim.get("local") or {}).get("islands", 1)


def saved_choices(
    saved: Mapping[str, Any],
    recorded: Mapping[str, str],
    fresh: DictConfig,
    overrides: Iterable[str],
    has_option: Callable[[str, str], bool],
) -> list[str]:
    """Return overrides that choose the checkpoint's recipe, and its option for each group, where the command line names none.

    With them the command line is composed and checked against the options that the resumed run has, and placement comes from
    the file of the run's own recipe.

    recorded: group → the option that the checkpoint states; has_option: whether a group has an option today
    """
    typed = typed_values(overrides)
    if "recipe" in typed and fresh.get("recipe") != saved.get("recipe"):
        return []
    found: list[str] = []
    recipe = saved.get("recipe")
    if "recipe" not in typed and recipe is not None and recipe != fresh.get("recipe") and has_option("recipe", recipe):
        found.append(f"recipe={recipe}")
    for group in (group for group in OPTIONS if group not in typed):
        node: dict[str, Any] = saved.get(group) or {}
        kind = option_of(group, node)
        if group in recorded and has_option(group, recorded[group]):
            found.append(f"{group}={recorded[group]}")
        elif group != "model" and kind is not None and fresh[group].get("_target_") != node["_target_"]:
            found.append(f"{group}={cast(Any, kind).name}")
    return found


def resume_config(
    saved: Mapping[str, Any], fresh: Composition, overrides: Iterable[str], recorded: Mapping[str, str] | None = None
) -> Resumed:
    """Return the config of a run that resumes from a checkpoint.

    A typed recipe other than the saved one replaces the saved config. Choosing the option that the checkpoint has keeps all
    keys of the group, also those that were typed earlier.

    Raises ConfigError where the checkpoint names a class that these words don't.

    saved: the checkpoint's config; fresh: the composition of this command line; overrides: its words
    recorded: group → the option that the checkpoint states; None: it is from before these were saved
    """
    today = cast(dict[str, Any], OmegaConf.to_container(fresh.config, resolve=True, throw_on_missing=False))
    typed = typed_values(overrides)
    recorded = recorded or {}
    if "recipe" in typed and today["recipe"] != saved.get("recipe"):
        told = [f"this run has the recipe {today['recipe']} from now on (it was {saved.get('recipe')})"]
        sides = key_sides(typed_config(fresh.config)[0])
        changed = [*_changes(saved, today, sides, Side.RECIPE, "changed recipe", watched=False)]
        return Resumed(fresh.config, [*told, *changed], [*_watched(saved, today, sides)], fresh.choices)
    merged: dict[str, Any] = copy.deepcopy(dict(saved))
    for key, value in typed.items():
        chooses = key in OPTIONS and isinstance(value, str)
        if key != "recipe" and not (chooses and _is_same_option(key, str(value), recorded, merged, today)):
            _put(merged, key, _at(today, key))
    refuse_unnamed_classes(merged, today)
    merged, dropped = _known(merged)
    stays = [*_keep_fitted(saved, merged)]
    sides = key_sides(typed_config(_schema(merged))[0])
    for key, side in sides.items():
        if side is Side.PLACEMENT and not _is_typed(key, typed):
            _put(merged, key, _placed(key, _at(today, key), _at(merged, key)))
    told = [
        *(f"{key} is no key of this version, and is left out" for key in dropped),
        *stays,
        *_replaced(saved, merged, typed),
        *_changes(saved, merged, sides, Side.RECIPE, "changed recipe", watched=False),
        *_changes(saved, merged, sides, Side.PLACEMENT, "changed placement"),
        *_kept(saved, today, merged, sides),
    ]
    choices = {**recorded, **{group: option for group, option in fresh.choices.items() if group in typed}}
    return Resumed(_schema(merged), told, [*_watched(saved, merged, sides)], choices)


def _keep_fitted(saved: Mapping[str, Any], merged: dict[str, Any]) -> Iterator[str]:
    """Keep the checkpoint's micro-batch where `auto` was typed and it is recipe; return what to say about it."""
    before = _at(dict(saved), MICRO)
    if _at(merged, MICRO) != FITTED or not isinstance(before, int):
        return
    if MICRO_SIDE.of(typed_config(_schema(merged))[0]) is Side.RECIPE:
        _put(merged, MICRO, before)
        yield f"{MICRO}={before} stays, in place of {FITTED}: it is recipe under {MICRO_SIDE.when}"


def typed_values(overrides: Iterable[str]) -> dict[str, Any]:
    """Return key → value of the words of a command line."""
    return dict(_typed(overrides))


def _typed(overrides: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for override in OverridesParser.create().parse_overrides([normalize_override(line) for line in overrides]):
        if not override.is_hydra_override():
            yield override.package or override.key_or_group, override.value()


def _is_typed(key: str, typed: Mapping[str, Any]) -> bool:
    """Return whether a key, or a node that contains it, was typed. Choosing a group's option does not type its keys."""
    return any(key == given or (key.startswith(f"{given}.") and given not in OPTIONS) for given in typed)


def _is_same_option(
    group: str, chosen: str, recorded: Mapping[str, str], merged: Mapping[str, Any], today: Mapping[str, Any]
) -> bool:
    """Return whether a typed choice names the option that the checkpoint has.

    Where that is not recorded, options of one class are the same; but all shapes of a model are of one class.
    """
    if group in recorded:
        return chosen == recorded[group]
    saved, fresh = merged.get(group), today[group]
    alike = isinstance(saved, dict) and all(saved.get(key) == fresh.get(key) for key in ("_target_", "name"))
    return alike and group != "model"


def _placed(key: str, now: Any, before: Any) -> Any:
    """Return the value of a placement key: today's; for data that today's command line does not place, the checkpoint's.

    Caches are of one machine, and never the checkpoint's.
    """
    lies_there = key.startswith(("data.", "validation.")) and not key.endswith(".cache_dir")
    if now is ABSENT or now == MISSING or (now is None and lies_there):
        return before if lies_there else ABSENT
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
    config: Any = OmegaConf.create(tree)  # resolves nothing: below, too, `${…}` stays as it is
    dropped = drop_unknown(config)
    tree = cast(dict[str, Any], OmegaConf.to_container(config))
    for group in OPTIONS:
        kind = option_of(group, tree[group])
        known = {key.name.partition(".")[0] for key in keys_of(kind)} if kind is not None else set(tree[group])
        for name in [name for name in tree[group] if name not in known]:
            del tree[group][name]
            dropped.append(f"{group}.{name}")
    return tree, dropped


def _schema(tree: dict[str, Any]) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(run_schema(), literal(tree)))


def _differences(saved: Mapping[str, Any], merged: dict[str, Any], keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, its two values in words) for those whose values differ from the checkpoint's."""
    for key in (key for key in keys if key not in UNREPORTED and not key.endswith("._target_")):
        before, now = _at(dict(saved), key), _at(merged, key)
        if before != now and ABSENT not in (before, now):
            yield key, f"{key}={_written(now)} (was {_written(before)})"


def _changes(
    saved: Mapping[str, Any], merged: dict[str, Any], sides: Mapping[str, Side], side: Side, head: str, watched: bool = True
) -> Iterator[str]:
    """Yield one line with the keys of a side whose values differ from the checkpoint's, if any do.

    watched: also those of which `_watched` warns
    """
    keys = (key for key, its in sides.items() if its is side and (watched or _consequence(key) is None))
    said = [words for _, words in _differences(saved, merged, keys)]
    if said:
        yield f"{head}: {', '.join(said)}"


def _watched(saved: Mapping[str, Any], merged: dict[str, Any], sides: Mapping[str, Side]) -> Iterator[str]:
    """Yield a warning for each changed key of the recipe whose change has consequences for what was trained so far."""
    keys = (key for key, side in sides.items() if side is Side.RECIPE and _consequence(key) is not None)
    for key, words in _differences(saved, merged, keys):
        yield f"{words}: {_consequence(key)}"


def _consequence(key: str) -> str | None:
    if key in HARMLESS:
        return None
    return CONSEQUENCES.get(key.partition(".")[0])


def _replaced(saved: Mapping[str, Any], merged: Mapping[str, Any], typed: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each typed choice of an option that replaces the checkpoint's: the keys that the new one lacks."""
    for group in (group for group in OPTIONS if isinstance(typed.get(group), str)):
        before, now = saved.get(group), merged[group]
        if isinstance(before, dict) and (
            lost := [f"{group}.{name}={_written(before[name])}" for name in before if name not in now]
        ):
            yield f"{group}={typed[group]} has no place for the checkpoint's {', '.join(lost)}"


def _kept(saved: Mapping[str, Any], today: dict[str, Any], merged: dict[str, Any], sides: Mapping[str, Side]) -> Iterator[str]:
    """Yield one line with the keys whose values are the checkpoint's, where the recipe files now say something else."""
    said: list[str] = []
    for key, side in sides.items():
        now, kept = _at(today, key), _at(merged, key)
        if side is not Side.PLACEMENT and now is not ABSENT and now != kept and kept == _at(dict(saved), key):
            said.append(f"{key}={_written(kept)} (now {_written(now)})")
    if said:
        yield KeptNotice(f"kept from the checkpoint, where the recipe files of today differ: {', '.join(said)}")


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
