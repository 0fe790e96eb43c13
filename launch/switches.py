"""Parse the command line of `meshloom train`: Hydra's switches, and overrides."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..config.compose import normalize_override
from ..config.problems import ConfigError

BAD_CONFIG = 2


def read_switches(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return Hydra's switches, and the arguments reordered for Hydra: switches first, then overrides."""
    from hydra._internal.utils import get_args_parser  # private; the parser that hydra.main itself uses

    arguments = [normalize_override(argument) for argument in argv]
    switches = get_args_parser().parse_intermixed_args(arguments)
    in_front = [argument for argument in arguments if argument not in switches.overrides]
    return switches, [*in_front, *switches.overrides]


def refuse(error: ConfigError) -> int:
    """Print problems that every rank finds, on rank 0 only. Return the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(error, file=sys.stderr)
    return BAD_CONFIG
