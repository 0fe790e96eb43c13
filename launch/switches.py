"""The words of `meshloom train`: Hydra's switches, and overrides."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..config.compose import opened
from ..config.problems import ConfigError

BAD_CONFIG = 2


def read_switches(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return Hydra's switches, and the words for Hydra, which wants the overrides in one row: switches go in front."""
    from hydra._internal.utils import get_args_parser  # private, but the one that hydra.main itself reads its switches with

    arguments = [opened(argument) for argument in argv]
    switches = get_args_parser().parse_intermixed_args(arguments)
    in_front = [argument for argument in arguments if argument not in switches.overrides]
    return switches, [*in_front, *switches.overrides]


def refuse(error: ConfigError) -> int:
    """Print problems that every process finds in the same way."""
    if os.environ.get("RANK", "0") == "0":
        print(error, file=sys.stderr)
    return BAD_CONFIG
