"""Decide `batch.micro=auto` and `trainer.activation=auto`: the fastest of what a plan fits into the run's GPUs.

Of settings whose predicted speeds differ by less than 1 % the one that holds least is taken. Where no GPU is known, values are
those that a config has by default. Where another micro-batch would change what is computed, `batch.micro` is recipe: it is
decided at the first start alone, and the checkpoint keeps the number. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config.keys import Side
from ..config.problems import ConfigError, Problem
from ..optim.batch.config import FITTED, MICRO_SIDE, BoundedConfig, StagesConfig
from ..parallel.layout import Layout, layout_problems
from ..parallel.policies import MIXED
from .relations import RELATIONS, Relation, Start, data_problems, validation_problems
from .schema import RunConfig
from .typed import replace_keys

if TYPE_CHECKING:
    from ..planner.cluster import ClusterConfig
    from ..planner.prediction import Prediction

MICRO, ACTIVATION = "batch.micro", "trainer.activation"
MICROS = (1, 2, 4, 8, 16, 32)
USUAL = 8
"""The largest micro-batch where no GPU is known: the default of the key."""
LARGE_VOCABULARY = 131_072
"""Tokens that a model is taken to know where only its data will tell: many, since a plan must not be too small."""
ALIKE = 0.01
"""Predictions that differ by less say nothing about which is faster."""


class UnknownMachineError(Exception):
    """There are GPUs, and nobody tells how large they are. The text says why."""


def _no_machine(_: RunConfig) -> ClusterConfig | None:
    return None


@dataclass
class Fitting:
    """Decides the keys that are left to a plan, and keeps what was decided.

    machine  config → the GPUs that the run is started on; None where it runs on processors, or nobody knows. It may raise
             ConfigError for GPUs that nothing can be fitted to, and UnknownMachineError for those whose size is not told
    values   key → value that was found
    notices  what to say about it
    """

    machine: Callable[[RunConfig], ClusterConfig | None] = _no_machine
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    notices: list[str] = field(default_factory=list[str])

    def resolve(self, config: RunConfig, start: Start, *, sound: bool) -> tuple[RunConfig, list[Problem]]:
        """Return the config with numbers in place of `auto`, and the problems of keys that can't be decided.

        sound: whether nothing is known to be wrong with the config; otherwise it is refused, and usual values do
        """
        left = config.left_to_plan
        if not left or "batch" in config.unusable:
            return config, []
        if MICRO in left and config.stages and MICRO_SIDE.of(config) is Side.RECIPE:
            text = f"is recipe under {MICRO_SIDE.when}: every stage would find another"
            return _usual(config, left), [Problem(MICRO, f"{FITTED} {text}", "give a number, for each stage if need be")]
        problems: list[Problem] = []
        if sound and start.world_size and not _layout_problems(config, start):
            try:
                machine = self.machine(config)
                if machine is not None:
                    return self._told(_fitted(config, start, left, machine), left), []
            except UnknownMachineError as reason:
                return self._told((_smallest(config, start, left), f"what holds least, for {reason}"), left), []
            except ConfigError as error:
                problems = error.problems
        return self._told((_sized(config, start, left) if sound else _usual(config, left), ""), left), problems

    def _told(self, found: tuple[RunConfig, str], left: Sequence[str]) -> RunConfig:
        config, told = found
        self.values |= {MICRO: config.batch.micro_size, ACTIVATION: config.trainer.activation}
        self.values = {key: self.values[key] for key in left}
        values = ", ".join(f"{key}={value}" for key, value in self.values.items())
        self.notices.append(f"{values}, in place of {FITTED}: {told or 'usual values, for no GPU to be fitted to'}")
        return config


def _layout_problems(config: RunConfig, start: Start) -> list[Problem]:
    return layout_problems(config.parallel, start.world_size, config.islands_on(start.world_size))


def _usual(config: RunConfig, left: Sequence[str], micro: int = USUAL) -> RunConfig:
    return replace_keys(config, {key: {MICRO: micro, ACTIVATION: "none"}[key] for key in left})


def _largest_batch(config: RunConfig) -> int | None:
    """Return the samples of the run's largest step, as far as the config says it; None where only the controller knows them."""
    samples = [config.batch.samples] if isinstance(config.batch.samples, int) else []
    if isinstance(config.batch, BoundedConfig):
        samples.append(config.batch.max)
    elif isinstance(config.batch, StagesConfig):
        samples += [size for _, size in config.batch.points()]
    return max(samples, default=None)


def _share(config: RunConfig, start: Start) -> int:
    """Return the samples of a data rank in that step."""
    islands = config.islands_on(start.world_size)
    data = islands * (Layout.plan(config.parallel, start.world_size, islands).data_size if start.world_size else 1)
    return -(-(_largest_batch(config) or 1) // data)


def _priced(config: RunConfig) -> RunConfig:
    """Return a config whose costs can be counted, with numbers for what the run has not told yet."""
    values: dict[str, Any] = {"batch.samples": _largest_batch(config) or 1}
    if not (config.model.vocabulary or config.data.known_vocabulary):
        values["model.vocabulary"] = LARGE_VOCABULARY
    return replace_keys(config, values)


def _micros(config: RunConfig, start: Start) -> list[int]:
    share = _share(config, start)
    return [micro for micro in MICROS if micro <= share]


def _reads_choice(relation: Relation) -> bool:
    """Return whether a relation reads a key that may be left to a plan."""
    return any(key == need or key.startswith(f"{need}.") for need in relation.needs for key in (MICRO, ACTIVATION))


def _faults(config: RunConfig, start: Start) -> int:
    """Count what relations of keys have against a choice."""
    return sum(len(list(relation.check(config, start))) for relation in RELATIONS if _reads_choice(relation))


def _is_refused(config: RunConfig, start: Start) -> bool:
    """Return whether the run is refused whatever is chosen, its data aside: costs of such a run may not be defined."""
    others = (each for each in RELATIONS if not _reads_choice(each) and each.check not in (data_problems, validation_problems))
    return any(list(relation.check(config, start)) for relation in others)


def _sized(config: RunConfig, start: Start, left: Sequence[str]) -> RunConfig:
    """Return usual values: the largest micro-batch up to the default that nothing is against."""
    if start.world_size and _layout_problems(config, start):
        return _usual(config, left)
    micros = [micro for micro in reversed(_micros(config, start)) if micro <= USUAL]
    tried = [_usual(config, left, micro) for micro in micros]
    return min(tried, key=lambda each: _faults(each, start)) if MICRO in left else tried[0]


def _smallest(config: RunConfig, start: Start, left: Sequence[str]) -> RunConfig:
    """Return the values that hold least, of those that nothing is against."""
    tried = [
        replace_keys(config, {key: {MICRO: micro, ACTIVATION: policy}[key] for key in left})
        for micro in (_micros(config, start) if MICRO in left else MICROS[:1])
        for policy in (reversed(MIXED) if ACTIVATION in left else MIXED[:1])
    ]
    return min(tried, key=lambda each: _faults(each, start))


def _fitted(config: RunConfig, start: Start, left: Sequence[str], machine: ClusterConfig) -> tuple[RunConfig, str]:
    """Return the config with the fastest values that fit, and how they were found.

    Raises ConfigError for a run whose costs are not known.
    """
    from ..planner.prediction import usable_bytes
    from .costs import Costing

    refused = _sized(config, start, left), "usual values, for the run is refused whatever they are"
    if _is_refused(refused[0], start):
        return refused
    micros = _micros(config, start) if MICRO in left else [config.batch.micro_size]
    policies = MIXED if ACTIVATION in left else [config.trainer.activation]
    costing: Costing | None = None
    tried: list[tuple[Prediction, RunConfig]] = []
    crowded = False
    for micro in micros:
        # Beyond the first that does not fit, a micro-batch may only fit where it is alone in its step: it adds up no gradients.
        if crowded and micro < _share(config, start):
            continue
        lawful = [replace_keys(config, {MICRO: micro, ACTIVATION: policy}) for policy in policies]
        lawful = [each for each in lawful if not _faults(each, start)]
        costing = costing or (Costing(_priced(config), start.world_size, machine) if lawful else None)
        found = [(costing.predict(_priced(each)), each) for each in lawful] if costing is not None else []
        crowded = crowded or (bool(found) and not any(each.fits for each, _ in found))
        tried += found
    if not tried:
        return refused
    fitting = [(found, each) for found, each in tried if found.fits]
    gib, where = 2**30, f"{machine.gpu} of {machine.memory:.4g} GiB"
    if not fitting:
        found, each = min(tried, key=lambda pair: pair[0].bytes)
        usable = usable_bytes(machine.memory * gib) / gib
        told = f"planned at {found.bytes / gib:.4g} GiB, and a plan may take {usable:.4g} of {where}"
        return each, f"NOTHING FITS, and this holds least; {told}: `meshloom plan --best 3` finds layouts that do"
    fastest = min(found.seconds for found, _ in fitting)
    alike = [(found, each) for found, each in fitting if found.seconds <= fastest * (1 + ALIKE)]
    found, each = min(alike, key=lambda pair: (pair[0].bytes, pair[0].seconds))
    return each, f"the fastest that fits {where}, planned at {found.bytes / gib:.4g} GiB and {found.mfu:.0%} MFU"
