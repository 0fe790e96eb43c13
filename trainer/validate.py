"""Collect all problems of a run, before a process group or any GPU memory is touched.

Problems come in three rounds. The first two need no PyTorch: the values of each group by themselves, then how groups fit
together. Only a config without any such problem is built, on the meta device (`trial_build.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

from ..config.problems import Problem
from ..optim.progress import BEGINNING, Progress
from .automatic import resolve_automatic
from .fitting import Fitting
from .relations import RELATIONS, Relation, Start, data_problems, validation_problems
from .schema import RunConfig
from .stages.record import Place


def checked_config(
    config: RunConfig,
    world_size: int,
    known: Collection[Problem] = (),
    *,
    elsewhere: list[Problem] | None = None,
    progress: Progress = BEGINNING,
    place: Place | None = None,
    more: Callable[[RunConfig], Sequence[Problem]] = lambda _: (),
    before_building: Callable[[RunConfig], None] = lambda _: None,
    builds: Callable[[RunConfig], bool] = lambda _: True,
    fitting: Fitting | None = None,
) -> tuple[RunConfig, list[Problem]]:
    """Return the config, and every problem of it on `world_size` processes (0: not known). Writes nothing and reads no data.

    Values that the config leaves to a scaling law (auto:…) or to a plan (auto) are decided in the config that is returned.

    known            problems found so far; returned too, and checks that read their keys are skipped
    elsewhere        given if the data may lie on another machine: problems of its files are appended here instead
    progress         of the checkpoint that the run resumes from
    place            of the run among its stages; None: it has none
    more             config → further problems that need no PyTorch, of the machine for example
    before_building  called if nothing was found so far, before PyTorch is imported for the trial build
    builds           whether to build a config without problems on trial; a plan need not, where costs are known without
    fitting          how values that are left to a plan are decided; None: as on a machine without GPUs
    """
    start = Start(world_size, progress, place)
    said, keys = {(problem.key, problem.message) for problem in known}, {problem.key for problem in known}
    own = (problem for problem in config.problems() if (problem.key, problem.message) not in said)
    problems = [*known, *(problem for problem in own if keys.isdisjoint(problem.unless))]
    if not problems and config.left_to_laws:
        config, unlawful = resolve_automatic(config)
        problems += unlawful
    config, undecided = (fitting or Fitting()).resolve(config, start, sound=not problems and not config.left_to_laws)
    problems += undecided
    faults = [problem.key for problem in problems if _is_read(config, problem.key)]
    faults += [*config.unusable, *config.left_to_laws]
    for relation in RELATIONS:
        if not any(_touches(relation, fault) for fault in faults):
            found = relation.check(config, start)
            if relation.check in (data_problems, validation_problems) and elsewhere is not None:
                elsewhere += found
            else:
                problems += [problem for problem in found if problem not in problems]
    problems += [problem for problem in more(config) if problem not in problems]
    if problems or not builds(config):
        return config, problems
    before_building(config)
    from .trial_build import build_problems

    return config, build_problems(config, start)


def run_problems(
    config: RunConfig, world_size: int, known: Collection[Problem] = (), progress: Progress = BEGINNING
) -> list[Problem]:
    """Return every problem of a config: see `checked_config`."""
    return checked_config(config, world_size, known, progress=progress)[1]


def _is_read(config: RunConfig, key: str) -> bool:
    """Return whether there is such a key: a misspelt one has no value that a relation could read."""
    node: object = config
    for name in key.partition("=")[0].split("."):
        if not dataclasses.is_dataclass(node):
            return True
        if name not in vars(node):
            return False
        node = vars(node)[name]
    return True


def _touches(relation: Relation, fault: str) -> bool:
    """Return whether a key at fault is one that a relation reads, inside one, or a node above one."""
    return any(
        fault == need or fault.startswith((f"{need}.", f"{need}=")) or need.startswith(f"{fault}.") for need in relation.needs
    )
