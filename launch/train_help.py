"""The text of `meshloom train --help`: what to type, and what there is to choose from. Imports no Hydra."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

USAGE = """\
usage: meshloom train [key=value …] [switches]

Train the model that the config describes. Start from a recipe, then change what you like:

  meshloom train recipe=quickstart
  meshloom train recipe=llama_1b data=synthetic optim.lr=3e-3 launch.nproc=4
  meshloom train recipe=quickstart trainer.steps=400 resume=auto    go on from the newest checkpoint
  meshloom train -m recipe=quickstart optim.lr=1e-3,3e-3            a sweep, each run in a folder of its own
  meshloom train --config-dir mine recipe=my_recipe                 with a folder of your own recipes

What there is to choose from:

{groups}

Keys are written group.name=value. `meshloom keys` lists every key, `meshloom keys optim` those of a group.

switches:
  -m, --multirun    run every combination of the values that are separated by commas
  --cfg job         print the config instead of training; with --resolve, references to other keys are replaced
  --config-dir DIR  a folder of further recipes, laid out as Meshloom's own: recipe/, model/, data/, …
  --hydra-help      more switches, of Hydra
  -h, --help        print this
"""
GROUPS = ("recipe", "model", "data", "optim", "schedule", "batch")
WIDTH = 110


def wants_help(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for help."""
    return any(word in ("-h", "--help") for word in arguments)


def usage(arguments: Sequence[str]) -> str:
    """Return the text for a command line, with the options of its `--config-dir` too."""
    places = [Path(str(files("meshloom.recipes")))]
    for number, word in enumerate(arguments):
        if word.startswith("--config-dir="):
            places.append(Path(word.partition("=")[2]))
        elif word in ("--config-dir", "-cd") and number + 1 < len(arguments):
            places.append(Path(arguments[number + 1]))
    lines: list[str] = []
    for group in GROUPS:
        options = sorted({path.stem for place in places for path in (place / group).glob("*.yaml")})
        head = f"  {group + '=':<10}"
        lines += textwrap.wrap(", ".join(options), WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    return USAGE.format(groups="\n".join(lines))
