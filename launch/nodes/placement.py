"""The layout of a run for each number of machines that it may go on with: given, as typed, or planned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...config.keys import Side
from ...config.problems import ConfigError, Problem
from ...config.words import counted
from ...trainer.launching import LaunchConfig, run_processes
from ...trainer.resolve import ResolvedRun, ResolveOptions, resolve
from ...trainer.schema import RunConfig
from ...trainer.sides import key_sides
from ...trainer.typed import value_of
from ..typed_words import changed_words, given_keys
from .part import overlaid

LAYOUT = re.compile(r"\+{0,2}(parallel\.(tp|pp|cp|ep|replicate|zero|schedule|stage\w+)|batch\.micro|trainer\.activation)=")
"""Words that a plan for another number of machines may set anew."""


@dataclass(frozen=True)
class Placements:
    """Number of machines → overrides for it. notices: what was planned, and numbers on which the run can't go on."""

    words: dict[int, list[str]]
    notices: list[str]


def place(resolved: ResolvedRun, overrides: Sequence[str], config_dir: str | None, options: ResolveOptions) -> Placements:
    """Return the layouts of a run for all numbers of machines of launch.nodes.

    resolved: the run on the largest number, as typed. Raises ConfigError where it can't go on with the least number, or where
    launch.placements says what is no placement.
    """
    launch = resolved.config.launch
    found = Placements({launch.most_nodes: []}, [])
    given = {number: list(words) for number, words in launch.placements.items()}
    problems = [problem for number, words in given.items() for problem in _problems_of_words(number, words, resolved)]
    if problems:
        raise ConfigError(problems)
    for number in range(launch.most_nodes, launch.least_nodes - 1, -1):
        words = given.get(number)
        if words is None and number == launch.most_nodes:
            continue
        typed = _resolved_on(number, overlaid(overrides, words or []), config_dir, options, launch)
        if not typed.problems:
            found.words[number] = words or []
        elif words is not None:
            raise ConfigError([replace(each, key=f"launch.placements.{number}: {each.key}") for each in typed.problems])
        else:
            _plan(number, typed, overrides, config_dir, options, found)
    if launch.least_nodes not in found.words:
        fix = "give launch.placements for it, or a larger least number"
        message = f"{launch.least_nodes} is too few: {found.notices[-1]}"
        raise ConfigError([Problem("launch.nodes", message, fix)])
    return found


def _plan(
    number: int,
    typed: ResolvedRun,
    overrides: Sequence[str],
    config_dir: str | None,
    options: ResolveOptions,
    found: Placements,
) -> None:
    """Plan the fastest layout that fits so many machines, and add it to what was found."""
    from ...trainer.machine_gpus import planned_machine
    from ..plan_best import best_layouts

    free = [word for word in overrides if not LAYOUT.match(word)]
    why = f"{typed.problems[0].key}: {typed.problems[0].message}"
    try:
        alone = ["parallel.tp=1", "parallel.pp=1", "parallel.cp=1", "parallel.ep=1"]
        machines = [f"launch.nodes={number}", "launch.placements={}", "launch.spare_nodes=0"]
        run = _resolved_on(number, overlaid(free, [*alone, *machines]), config_dir, options, typed.config.launch)
        run.refuse()
        best = best_layouts(run, free, planned_machine(run.config), 1)
        settings = best.candidates[0].settings
        words = changed_words(settings, {key: value_of(typed.config, key) for key in settings})
        _resolved_on(number, overlaid(overrides, words), config_dir, options, typed.config.launch).refuse()
    except ConfigError as error:
        found.notices.append(f"with {counted(number, 'machine')} no layout was found ({why}; planned: {error.problems[0]})")
        return
    found.words[number] = words
    found.notices.append(f"with {counted(number, 'machine')} the run goes on with {' '.join(words)} (planned, for {why})")


def _resolved_on(
    number: int, words: Sequence[str], config_dir: str | None, options: ResolveOptions, launch: LaunchConfig
) -> ResolvedRun:
    """Resolve the run on so many machines like this one, without building it on trial or looking at this one again.

    launch.nodes stays as in the words: it says how many islands (`optim.local`) are not there.
    """
    local = run_processes(launch)

    def processes(_: RunConfig) -> int:
        return local * number

    def never(_: RunConfig) -> bool:
        return False

    def nothing(_: RunConfig) -> Sequence[Problem]:
        return ()

    options = replace(options, processes=processes, builds=never, more=nothing)
    return resolve(overlaid(words, [f"launch.nproc={local}"]), options, config_dir)


def _problems_of_words(number: int, words: Sequence[str], resolved: ResolvedRun) -> list[Problem]:
    """Return a problem for each override that is no placement: it would change what the run computes."""
    found: list[Problem] = []
    sides = key_sides(resolved.config)
    for key in sorted(given_keys(words)):
        if sides.get(key) is not Side.PLACEMENT:
            fix = "give keys of placement, such as parallel.pp (see `meshloom keys`)"
            message = f"{key} is no key of placement: it says what is computed, or how the run saves"
            found.append(Problem(f"launch.placements.{number}", message, fix))
    return found
