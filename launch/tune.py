"""`meshloom tune`: the fastest settings that fit, for a recipe and a machine. By arithmetic; --measure N tries the N best.

meshloom tune recipe=llama_8b launch.nproc=2 --measure 3
meshloom tune recipe=llama_8b cluster=h200x2 --measure 3

It varies what changes speed and memory alone: parallel.zero, batch.micro, trainer.activation and, where blocks can't keep
everything, trainer.activation_budget. With a cluster it searches the layouts, too: parallel.tp, pp, cp and the others that
`meshloom plan --best` varies. What the command line gives stays as it is, and so does all else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..config.problems import ConfigError, Problem
from ..trainer.launching import planned_processes
from ..trainer.resolve import compose_config
from ..trainer.validate import run_problems
from .exit_codes import BAD_CONFIG
from .plan_cluster import split_words
from .tuned_keys import KEYS


def main(argv: Sequence[str]) -> int:
    """Print the fastest settings. Return 0; 2 for a run that no setting makes possible; 1 if none could be measured."""
    parser = argparse.ArgumentParser("meshloom tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="recipe=… and key=value, as for `meshloom train`")
    told = "memory of a GPU in GiB (default: of the smallest one here)"
    parser.add_argument("--memory", metavar="GIB", type=float, help=told)
    told = "run the N best for a few steps each, and rank them by what they did"
    parser.add_argument("--measure", metavar="N", type=int, default=0, help=told)
    parser.add_argument("--config-dir", help="folder of further recipes")
    arguments = parser.parse_intermixed_args(list(argv))
    try:
        if arguments.measure < 0:
            raise ConfigError([Problem("--measure", f"{arguments.measure} is not a number of runs", "give 1 or more")])
        words, cluster = split_words(arguments.overrides, arguments.config_dir)
        if cluster is not None and arguments.memory is not None:
            fix = f"leave it out, or give cluster.memory={arguments.memory:g}"
            raise ConfigError([Problem("--memory", "the cluster says what its GPUs have", fix)])
        if cluster is None:
            _refuse(words, arguments.config_dir)
        from .tuning import tune_and_show  # which needs PyTorch

        return tune_and_show(words, arguments.config_dir, arguments.memory, arguments.measure, cluster)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG


def _refuse(overrides: Sequence[str], config_dir: str | None) -> None:
    """Raise ConfigError, before anything slow, for words that no setting can mend."""
    config, known = compose_config(overrides, config_dir)
    if known:
        raise ConfigError(run_problems(config, planned_processes(config.launch), known))
    stuck = [problem for problem in config.problems() if problem.key not in KEYS]
    if stuck:
        raise ConfigError(run_problems(config, planned_processes(config.launch)))
