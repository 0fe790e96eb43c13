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
from ..optim.batch.config import FITTED, MICRO_SIDE, StagesConfig
from ..parallel.layout import Layout, layout_problems
from .relations import RELATIONS, Start
from .schema import RunConfig
from .typed import replace_keys

if TYPE_CHECKING:
    from ..planner.cluster import ClusterConfig
    from ..planner.prediction import Prediction

MICRO, ACTIVATION = "batch.micro", "trainer.activation"
POLICIES = ("none", "selective", "full")
MICROS = (1, 2, 4, 8, 16, 32)
USUAL = 8
"""The largest micro-batch where no GPU is known: the default of the key."""
LARGE_VOCABULARY = 131_072
"""Tokens that a model is taken to know where only its data will tell: many, since a plan must not be too small."""
ALIKE = 0.01
"""Predictions that differ by less say nothing about which is faster."""


def _no_machine(_: RunConfig) -> ClusterConfig | None:
    return None


@dataclass
class Fitting:
    """How keys that are left to a plan are decided, and what was decided.

    machine  config → the GPUs that the run is started on; None where it runs on processors, or nobody knows
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
        if sound and start.world_size and not layout_problems(config.parallel, start.world_size):
            try:
                machine = self.machine(config)
                if machine is not None:
                    return self._told(_fitted(config, start, left, machine), left), []
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


def _usual(config: RunConfig, left: Sequence[str], micro: int = USUAL) -> RunConfig:
    return replace_keys(config, {key: {MICRO: micro, ACTIVATION: "none"}[key] for key in left})


def _first_batch(config: RunConfig) -> int | None:
    """Return the samples of the step that the run begins with; None where only the controller knows them."""
    samples = config.batch.samples
    if not isinstance(samples, int) and isinstance(config.batch, StagesConfig):
        samples = config.batch.points()[0][1]
    return samples if isinstance(samples, int) else None


def _share(config: RunConfig, start: Start) -> int:
    """Return the samples of a data rank in that step."""
    data = Layout.plan(config.parallel, start.world_size).data_size if start.world_size else 1
    return -(-(_first_batch(config) or 1) // data)


def _priced(config: RunConfig) -> RunConfig:
    """Return a config whose costs can be counted, with numbers for what the run has not told yet."""
    values: dict[str, Any] = {"batch.samples": _first_batch(config) or 1}
    if not (config.model.vocabulary or config.data.known_vocabulary):
        values["model.vocabulary"] = LARGE_VOCABULARY
    return replace_keys(config, values)


def _micros(config: RunConfig, start: Start) -> list[int]:
    share = _share(config, start)
    return [micro for micro in MICROS if micro <= share]


def _faults(config: RunConfig, start: Start) -> int:
    """Count what relations of keys have against a choice."""
    keys = MICRO, ACTIVATION
    touched = (
        each for each in RELATIONS if any(key == need or key.startswith(f"{need}.") for need in each.needs for key in keys)
    )
    return sum(len(list(relation.check(config, start))) for relation in touched)


def _sized(config: RunConfig, start: Start, left: Sequence[str]) -> RunConfig:
    """Return usual values: the largest micro-batch up to the default that nothing is against."""
    if start.world_size and layout_problems(config.parallel, start.world_size):
        return _usual(config, left)
    micros = [micro for micro in reversed(_micros(config, start)) if micro <= USUAL]
    tried = [_usual(config, left, micro) for micro in micros]
    return min(tried, key=lambda each: _faults(each, start)) if MICRO in left else tried[0]


def _fitted(config: RunConfig, start: Start, left: Sequence[str], machine: ClusterConfig) -> tuple[RunConfig, str]:
    """Return the config with the fastest values that fit, and how they were found.

    Raises ConfigError for a run whose costs are not known.
    """
    from ..planner.prediction import usable_bytes
    from .costs import Costing

    costing = Costing(_priced(config), start.world_size, machine)
    micros = _micros(config, start) if MICRO in left else [config.batch.micro_size]
    policies = POLICIES if ACTIVATION in left else [config.trainer.activation]
    tried: list[tuple[int, Prediction, RunConfig]] = []
    for micro in micros:
        for policy in policies:
            each = replace_keys(config, {MICRO: micro, ACTIVATION: policy})
            faults = _faults(each, start)
            # A choice that is refused anyway need not be planned, but for the first: its problems are then what is said.
            if not faults or not tried:
                tried.append((faults, costing.predict(_priced(each)), each))
        fit = [found.fits for _, found, each in tried if each.batch.micro == micro]
        if fit and not any(fit):
            break  # nor does a larger one
    lawful = [each for each in tried if each[0] == min(faults for faults, *_ in tried)]
    fitting = [(found, each) for _, found, each in lawful if found.fits]
    gib, where = 2**30, f"{machine.gpu} of {machine.memory:.4g} GiB"
    if not fitting:
        found, each = min(((found, each) for _, found, each in lawful), key=lambda pair: pair[0].bytes)
        usable = usable_bytes(machine.memory * gib) / gib
        told = f"planned at {found.bytes / gib:.4g} GiB, and a plan may take {usable:.4g} of {where}"
        return each, f"NOTHING FITS, and this holds least; {told}: `meshloom plan --best 3` finds layouts that do"
    fastest = min(found.seconds for found, _ in fitting)
    alike = [(found, each) for found, each in fitting if found.seconds <= fastest * (1 + ALIKE)]
    found, each = min(alike, key=lambda pair: (pair[0].bytes, pair[0].seconds))
    return each, f"the fastest that fits {where}, planned at {found.bytes / gib:.4g} GiB and {found.mfu:.0%} MFU"
