"""Parse the command line of `meshloom train`: Hydra's switches, and overrides."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from ..config.overrides import normalize_override
from ..config.problems import ConfigError, Problem
from .exit_codes import BAD_CONFIG


def read_switches(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return Hydra's switches, and the arguments reordered for Hydra: switches first, then overrides.

    Raises ConfigError for switches that do not exist; the key that was meant is in the message.
    """
    from hydra._internal.utils import get_args_parser  # private; the parser that hydra.main itself uses

    arguments = [normalize_override(argument) for argument in argv]
    switches, unknown = get_args_parser().parse_known_intermixed_args(arguments)
    if unknown:
        raise ConfigError([_unknown_switch(word, arguments) for word in unknown])
    in_front = [argument for argument in arguments if argument not in switches.overrides]
    return switches, [*in_front, *switches.overrides]


def _unknown_switch(word: str, arguments: Sequence[str]) -> Problem:
    """Return the problem of a switch that does not exist: most likely a key, written as other programs have it."""
    from ..trainer.schema import group_keys, groups

    switch, equals, value = word.partition("=")
    if not equals:
        after = arguments[arguments.index(word) + 1 :]
        value = after[0] if after and "=" not in after[0] and not after[0].startswith("-") else "…"
    name = switch.lstrip("-").replace("-", "_")
    keys = [one.name for group in groups() for one in group_keys(group)]
    meant = [key for key in dict.fromkeys(keys) if name in (key, key.rpartition(".")[2])]
    if not meant:
        last = {key.rpartition(".")[2]: key for key in keys}
        meant = [last[near] for near in difflib.get_close_matches(name, last, 1, cutoff=0.75)]
    hint = " or ".join(f"{key}={value}" for key in meant)
    fix = f"write {hint}" if hint else "write keys as key=value; see `meshloom keys` and `meshloom train --help`"
    return Problem(switch, "there is no such switch", fix)


def refuse(error: ConfigError) -> int:
    """Print problems that every rank finds, on rank 0 only. Return the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(error, file=sys.stderr)
    return BAD_CONFIG
