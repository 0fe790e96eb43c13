"""Overrides of a command line: written for Hydra, read from it, and listed for a sweep."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import OverrideParseException

from .problems import Problem

NAMED = ("model", "data", "optim", "schedule", "batch")  # groups whose options carry a name
OPEN_NODES = tuple(
    f"{node}{mark}"
    for node in ("parallel.deepspeed.config", "optim.modules", "stages", "validation", "launch.sbatch", "launch.placements")
    for mark in ".="
)  # their keys are in no schema


def normalize_override(argument: str) -> str:
    """Rewrite an argument of the command line for Hydra.

    Keys in no schema (another library's, names of the user's own) get Hydra's "++". `optim.name=lamb` becomes `optim=lamb`,
    which chooses the option; the name alone would change nothing.
    """
    if argument.startswith(OPEN_NODES):
        return f"++{argument}"
    return re.sub(rf"^({'|'.join(NAMED)})\.name=", r"\1=", argument)


def quoted(text: str) -> str:
    """Quote a text as the value of an override, so that Hydra reads back exactly that text."""
    return QuotedString(text, Quote.single).with_quotes()


def task_overrides() -> list[str]:
    """Return the overrides of this process's command line; none outside of `hydra.main`."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def parse_overrides(overrides: Sequence[str], loader: ConfigLoader | None, problems: list[Problem]) -> Iterator[Override]:
    """Yield the overrides that can be read, and add a problem for each of the others. loader: for a sweep's glob(*)"""
    parser = OverridesParser.create(loader)
    for line in overrides:
        try:
            yield from parser.parse_overrides([normalize_override(line)])
        except OverrideParseException:
            fix = "write key=value, and quote what holds spaces, commas or brackets: 'key=\"a, b\"'"
            problems.append(Problem(line, "can't be read", fix))


def swept_overrides(override: Override) -> list[str]:
    """Return an override as written, or one override for each value that it sweeps over."""
    if not override.is_discrete_sweep():
        return [override.input_line or ""]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def written(overrides: Iterable[Override]) -> list[str]:
    """Return overrides as they are written."""
    return [override.input_line or "" for override in overrides]


def is_plain(override: Override) -> bool:
    """Return whether an override gives an existing key one value, which is no dictionary."""
    marked = override.is_add() or override.is_force_add() or override.is_delete() or override.is_hydra_override()
    special = marked or override.is_sweep_override() or override.package is not None
    return not special and not isinstance(override.value(), dict)


def key_of(override: Override) -> str:
    """Return the key or group that an override is about, without Hydra's marks."""
    return override.get_key_element().lstrip("+~")
