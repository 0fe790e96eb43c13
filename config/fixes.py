"""Words for what is wrong with an override, and for what to write in its place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from .duration import Unit, parse_count
from .problems import Problem
from .renames import RENAMED_KEYS


def unknown_key(key: str, known: Iterable[str]) -> Problem:
    """Return the problem of an unknown key, with its new name or near misses as the fix."""
    if key in RENAMED_KEYS:
        return Problem(key, "has another name now", f"write {RENAMED_KEYS[key]}")
    return Problem(key, "there is no such key", near_miss(key, known))


def current_value(key: str, value: Any) -> str:
    """Word the fix for a bad value: the value without the override."""
    if isinstance(value, DictConfig) and value:
        return f"set one of its keys: {', '.join(f'{key}.{name}' for name in value)}"
    if isinstance(value, DictConfig | ListConfig):
        return f"here it is {key}={OmegaConf.to_container(value)}"
    return f"here it is {OmegaConf.to_yaml(OmegaConf.create([value]))[2:].strip()}"


def near_miss(key: str, known: Iterable[str]) -> str:
    """Word the fix for a misspelt key: the nearest known keys of the same group, or else keys with the same last name."""
    known = list(known)
    parent, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    near = [siblings[match] for match in difflib.get_close_matches(leaf, siblings, 2)]
    near = near or [name for name in known if name.rpartition(".")[2] == leaf]
    if not near and parent and siblings:
        return f"{parent} has: {', '.join(siblings)}"
    near = near or difflib.get_close_matches(key, known, 2)
    return f"did you mean {' or '.join(near[:2])}?" if near else "see `meshloom keys` for every key"


def in_full(key: str, message: str) -> str:
    """Word the fix for a whole number that is written as 1e9 or 1.5B; "" for another error of Hydra's."""
    written = re.match(r"Value '(.+)' of type '\w+' could not be converted to Integer", message)
    try:
        return f"write a whole number in full: {key}={parse_count(written[1], Unit.STEPS):_}" if written else ""
    except ValueError:
        return ""


def reason_of(error: BaseException) -> tuple[str, str]:
    """Return the reason of an error in one line, from its innermost cause without Hydra's framing, and a fix or ''."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, yaml.MarkedYAMLError):
        return f"bad YAML: {' '.join(lines)}", "correct the file"
    framed = re.match(r"In '(.+)': \w+ raised while composing config:", lines[0])
    if framed and len(lines) > 1:
        key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
        if key == "recipe" and "DictConfig" in lines[1]:
            what = "its keys were read as those of a group called recipe"
            return what, f"put '# @package _global_' on the first line of {framed[1]}.yaml"
        whole = in_full(key, lines[1])
        return f"{lines[1]}{f' ({key})' if key else ''}", f"correct recipes file {framed[1]}.yaml{whole and f': {whole}'}"
    return lines[0].rstrip("."), ""
