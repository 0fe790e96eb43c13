"""`meshloom keys`: every key of the config, with its type, default, side and meaning.

meshloom keys                 all of them
meshloom keys optim           a group
meshloom keys optim.lr        a key
meshloom keys batch.norm_test  what an option of a group has
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..config.keys import MISSING
from ..config.problems import ConfigError, Problem
from ..trainer.schema import OPTIONS, GroupKey, group_keys, groups
from .exit_codes import BAD_CONFIG

HYDRAS = ("_target_", "_recursive_", "name")
"""Keys of every option: described in `INTRODUCTION`, and listed only when asked for by name."""

INTRODUCTION = """# Keys of the config

Made by `meshloom keys --markdown` from the dataclasses that declare them. Durations are written `200`, `200 steps`,
`1.5B tokens`, `4k samples`, `10%` or `0.1` (of the run). Groups with options (`model`, `data`, `optim`, `schedule`, `batch`)
also have `name`, the option's, and `_target_`, the class that is built: one of your own may stand there. Where options have
other defaults, these follow in brackets.

The side says what a resumed run does with a key. *Recipe* is what is computed: it comes from the checkpoint, with the command
line's overrides on top. *Placement* is where and how: it comes from today's command line and recipe files. A *habit* is kept
from the checkpoint until another is typed.
"""


def main(argv: Sequence[str]) -> int:
    """Print the keys asked for. Return 0, or 2 if there are none."""
    parser = argparse.ArgumentParser("meshloom keys", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("key", nargs="?", default="", help="a group, a key, or <group>.<option>; default: all")
    parser.add_argument("--markdown", action="store_true", help="as docs/keys.md has them")
    arguments = parser.parse_args(argv)
    try:
        found = matching(arguments.key)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    print(markdown(found) if arguments.markdown else "\n\n".join(_entry(one) for one in found))
    return 0


def matching(name: str) -> list[GroupKey]:
    """Return the keys of a group or an option, or one key in every option. Raises ConfigError if there are none."""
    every = [one for group in groups() for one in group_keys(group) if one.key.name not in HYDRAS or one.name == name]
    group, _, option = name.partition(".")
    found = [one for one in every if name in ("", one.group, one.name) or one.name.startswith(f"{name}.")]
    if not found and group in OPTIONS:
        there = [one for one in every if one.group == group and option in one.options]
        found = [replace(one, options={option: one.options[option]}, everywhere=True) for one in there]
    if not found:
        names = [*filter(None, groups()), *(one.name for one in every)]
        near = difflib.get_close_matches(name, names, 2)
        fix = f"did you mean {' or '.join(near)}?" if near else f"the groups are {', '.join(filter(None, groups()))}"
        raise ConfigError([Problem(name, "there is no such key, group or option", fix)])
    return found


def _entry(one: GroupKey) -> str:
    owners = "" if one.everywhere else f" · of {one.group}={', '.join(one.options)}"
    return f"{one.name}={_default(one)}\n    {one.key.type} · {one.key.side}{owners}\n    {one.key.meaning}"


def _default(one: GroupKey) -> str:
    """Return the default; where options differ, the first option's with the others' behind it."""
    first, *_ = one.options.values()
    others = [f"{name}: {_written(value)}" for name, value in one.options.items() if value != first]
    return _written(first) + (f" ({', '.join(others)})" if others else "")


def _written(value: Any) -> str:
    """Return a value as written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "(to be given)" if value == MISSING else str(value)


def markdown(found: Iterable[GroupKey]) -> str:
    """Return tables of the keys in Markdown, one per group."""
    lines = [INTRODUCTION]
    group: str | None = None
    for one in found:
        if one.group != group:
            group = one.group
            lines += [
                f"## {f'`{group}`' if group else 'The run'}",
                "",
                "| Key | Type | Default | Side | Meaning |",
                "|---|---|---|---|---|",
            ]
        owners = "" if one.everywhere else f"*{', '.join(one.options)}*: "
        cells = (f"`{one.name}`", one.key.type, f"`{_default(one)}`", str(one.key.side), f"{owners}{one.key.meaning}")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines).replace("|\n## ", "|\n\n## ")
