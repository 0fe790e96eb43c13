"""`meshloom tune`: the fastest settings that fit, for a recipe and a machine. By arithmetic; --measure N tries the N best.

meshloom tune recipe=llama_8b launch.nproc=2 --measure 3

It varies what changes speed and memory alone: parallel.zero, batch.micro, trainer.activation and, where blocks can't keep
everything, trainer.activation_budget. What the command line gives stays as it is, and so does all else.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from ..config.compose import Composer, opened
from ..config.problems import ConfigError, Problem
from ..models import swiglu
from ..parallel.speed import step_seconds
from .plan import WIDTH, Plan, plan_of, planned_processes
from .plan_tables import GIB, gib, right
from .train import BAD_CONFIG

BUDGET = "trainer.activation_budget"
KEYS = ("parallel.zero", "batch.micro", "trainer.activation", BUDGET)
POLICIES = ("none", "selective", "full")
SHOWN = 10
RESERVE = 2.0
"""GiB of a GPU that plans don't know of: CUDA, NCCL and compiled kernels."""
SHARE = 0.03
"""Part of a GPU that is left free besides: plans are within 2 % of what ranks hold (docs/parallelism.md), and fragments."""
ALIKE = 0.01
"""Predictions that differ by less say nothing about which is faster: steps of one and the same run differ by more."""
STEP = 0.05
"""Budgets are multiples of this."""
TRIES = 3
FIX = "use more processes, parallel.tp=2 or parallel.offload=cpu"

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """Settings that were planned. settings: key → value, of KEYS; seconds: of a step, for comparison."""

    settings: Settings
    plan: Plan
    seconds: float

    @property
    def bytes(self) -> int:
        """Of the fullest rank, at most at once."""
        return self.plan.bytes


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    given     the settings of the command line and the recipe
    fitting   fastest first
    as_given  the given settings, whether or not they fit; None where they can't run
    limit     bytes that a plan may take
    notes     what whoever reads the figures should know
    """

    config: DictConfig
    given: Settings
    fitting: list[Candidate]
    as_given: Candidate | None
    limit: float
    notes: list[str]

    def changes(self, candidate: Candidate) -> list[str]:
        """The overrides that turn the given run into a candidate."""
        return [f"{key}={written(value)}" for key, value in candidate.settings.items() if value != self.given[key]]


def main(argv: Sequence[str]) -> int:
    """Print what is fastest. Returns 0; 2 for a run that can't be, whatever its settings; 1 if none could be measured."""
    parser = argparse.ArgumentParser("meshloom tune", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="recipe=… and key=value, as for `meshloom train`")
    told = "memory of a GPU in GiB (default: of the smallest one here)"
    parser.add_argument("--memory", metavar="GIB", type=float, help=told)
    told = "run the N best for a few steps each, and rank them by what they did"
    parser.add_argument("--measure", metavar="N", type=int, default=0, help=told)
    parser.add_argument("--config-dir", help="folder of further recipes")
    arguments = parser.parse_intermixed_args(list(argv))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    command = [*([f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []), *arguments.overrides]
    try:
        if arguments.measure < 0:
            raise ConfigError([Problem("--measure", f"{arguments.measure} is not a number of runs", "give 1 or more")])
        with console.status("asking the GPUs …"):
            memory, fused = gpu_here(arguments.memory)
        with console.status("planning …"):
            tuned = tune(arguments.overrides, memory, arguments.config_dir, fused=fused)
        if arguments.measure:
            from .tune_measure import check

            check(tuned.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    console.print()
    usable = f"{tuned.limit / GIB:.1f} of {memory / GIB:.1f} GiB"
    console.print(f"{tuned.fitting[0].plan.layout.describe().rpartition(',')[0]}; a plan may take {usable}", highlight=False)
    console.print(table_of(tuned))
    for note in tuned.notes:
        console.print(f"· {note}", style="dim", highlight=False, markup=False)
    best = tuned.fitting[0]
    if arguments.measure:
        from .tune_measure import measure

        try:
            measured = measure(tuned, tuned.fitting[: arguments.measure], arguments.overrides, arguments.config_dir, console)
        except KeyboardInterrupt:
            print("meshloom tune: stopped, with what it had started", file=sys.stderr)
            return 128 + signal.SIGINT
        if measured is None:
            print("meshloom tune: none of them could be measured", file=sys.stderr)
            return 1
        best = measured
    # Not through rich, which would wrap a line that is there to be copied.
    print(shlex.join(["meshloom", "train", *command, *tuned.changes(best)]))
    return 0


def gpu_here(given: float | None) -> tuple[float, bool]:
    """Bytes of --memory, or of the smallest GPU here, and whether GPUs here compute SwiGLU inside its products.

    Raises ConfigError where there is neither. Of given memory nobody knows whose it is, so that SwiGLU is taken to be plain.
    """
    if given is not None:
        if not (given > 0 and math.isfinite(given)):
            raise ConfigError([Problem("--memory", f"{given:g} is not a number of GiB", "give what one GPU has: --memory 80")])
        return given * GIB, False
    if torch.cuda.device_count() == 0:
        raise ConfigError([Problem("--memory", "there is no GPU here to ask", "give what one GPU has, in GiB: --memory 80")])
    # By a child: CUDA keeps some of a GPU's memory for every process that has spoken to it.
    with ProcessPoolExecutor(1, get_context("spawn")) as child:
        try:
            return child.submit(ask_gpus).result()
        except RuntimeError as error:
            fix = "look at nvidia-smi, or give what one GPU has, in GiB: --memory 80"
            raise ConfigError([Problem("--memory", f"the GPUs here do not answer: {error}", fix)]) from error


def ask_gpus() -> tuple[float, bool]:
    """Bytes of the smallest GPU of this machine, and whether its kernels compute SwiGLU inside the products around it."""
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    return float(memory), swiglu.why_not(torch.device("cuda", 0)) is None


def tune(overrides: Sequence[str], memory: float, config_dir: str | None = None, *, fused: bool = False) -> Tuned:
    """Plan every setting and rank those that fit. memory: bytes of a GPU; fused: its kernels compute SwiGLU in its products.

    Raises ConfigError with the problems of the given run if no setting can run, and with the smallest if none fits.
    """
    limit = memory - RESERVE * GIB - SHARE * memory
    composition = Composer(config_dir).compose(overrides)
    config = composition.config
    search = _Search(config, composition.problems, fused)
    given = {key: OmegaConf.select(config, key) for key in KEYS}
    incomplete = composition.problems or OmegaConf.missing_keys(config)
    if incomplete and search.planned(given) is None:  # no setting mends a key that is not there
        raise search.refusals[tuple(given.values())]
    fixed = given_keys(overrides) & set(KEYS)
    notes = [f"{', '.join(sorted(fixed))} as the command line says"] if fixed else []
    if "batch.micro" not in fixed and (why := micro_is_fixed(config)):
        fixed.add("batch.micro")
        notes.append(f"batch.micro={given['batch.micro']} stays: {why}")
    found = search.all(given, fixed, limit)
    if not found:
        raise search.refusals[tuple(given.values())]
    fitting = ranked([one for one in found if one.bytes <= limit])
    if not fitting:
        least = min(found, key=lambda one: one.bytes)
        message = f"nothing fits: the least, {described(least.settings)}, is planned at {gib(least.bytes)} GiB"
        allowed = f"a plan may take {gib(max(0.0, limit))} of {gib(memory)} GiB"
        raise ConfigError([Problem("--memory", f"{message}, and {allowed}", FIX)])
    best = fitting[0].plan
    if best.job.fused:
        notes.append("SwiGLU is computed inside its products, as the GPUs here can: that is in these plans")
    notes += [note for note in best.notes if note.startswith("data")]
    if any(rank.optimizer is None for rank in best.cost.ranks):
        notes.append("what this optimizer keeps is not known before it runs, and not in these figures")
    notes.append("only the order of the predicted speeds means something; within 1 %, what takes less memory comes first")
    as_given = next((one for one in found if one.settings == given), None)
    return Tuned(config, given, fitting, as_given, limit, notes)


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Fastest first; of those that the prediction can't tell apart, what takes least memory."""
    fastest = min((one.seconds for one in candidates), default=1.0)
    return sorted(candidates, key=lambda one: (int((one.seconds / fastest - 1) / ALIKE), one.bytes, one.seconds))


def given_keys(overrides: Sequence[str]) -> set[str]:
    """The keys that a command line sets; those of words that can't be read are left out."""
    keys: set[str] = set()
    for line in overrides:
        with contextlib.suppress(OverrideParseException):
            keys |= {word.key_or_group for word in OverridesParser.create().parse_overrides([opened(line)])}
    return keys


def micro_is_fixed(config: DictConfig) -> str:
    """Why another batch.micro would mean other losses or other batches; empty where it would not."""
    if config.batch.get("name") != "fixed" or not isinstance(config.batch.get("micro"), int):
        return f"what batch={config.batch.get('name')} takes or measures may depend on it"
    if isinstance(config.batch.samples, str):
        return f"batch.samples={config.batch.samples} is rounded to it"
    if config.trainer.float8 != "none":
        return "float8's scales are of what is computed together"
    if config.optim.get("_target_") == "meshloom.optim.agvm.AGVM":
        return "AGVM compares halves of a rank's micro-batches"
    return ""


class _Search:
    """Plans settings of one config. refusals: why some can't run, by their values."""

    def __init__(self, config: DictConfig, known: Sequence[Problem], fused: bool) -> None:
        self._config = config
        self._known = known
        self._fused = fused
        self.refusals: dict[tuple[Any, ...], ConfigError] = {}

    def planned(self, settings: Settings) -> Candidate | None:
        """None for settings that can't run."""
        config = copy.deepcopy(self._config)
        for key, value in settings.items():
            if OmegaConf.select(config, key) != value:
                OmegaConf.update(config, key, value)
        try:
            plan = plan_of(config, self._known, fused=self._fused)
        except ConfigError as error:
            self.refusals[tuple(settings.values())] = error
            return None
        described_step = (plan.model, plan.parallel, plan.layout, plan.job, plan.cost, plan.away)
        return Candidate(settings, plan, step_seconds(*described_step, config.launch.nodes))

    def all(self, given: Settings, fixed: set[str], limit: float) -> list[Candidate]:
        """Every legal setting of the keys that are not fixed, and the given one if that is legal.

        Larger micro-batches than the first that does not fit are passed by, but for the largest: alone in its step, it needs
        no room to add gradients up.
        """
        parallel = self._config.parallel
        model = max(1, parallel.pp * parallel.cp * parallel.tp)
        data = max(1, planned_processes(self._config) // model)
        zero, micro, activation, budget = given.values()
        # Through a pipeline all stages are the same, and so they are on a single rank.
        alike = "parallel.zero" in fixed or parallel.pp > 1 or data * parallel.cp == 1
        micros = [micro] if "batch.micro" in fixed else divisors(self._config.batch.samples // data)
        found = {tuple(given.values()): self.planned(given)}
        for stage in [zero] if alike else sorted({zero, 1, 2, 3}):
            crowded = False
            for size in micros:
                if crowded and size != micros[-1]:
                    continue
                tried: list[Candidate | None] = []
                for policy in [activation] if "trainer.activation" in fixed else dict.fromkeys([*POLICIES, activation]):
                    settings: dict[str, Any] = dict(
                        zip(KEYS, (stage, size, policy, budget if BUDGET in fixed else None), strict=True)
                    )
                    key = tuple(settings.values())
                    if key not in found:
                        found[key] = self.planned(settings)
                    tried.append(found[key])
                    if policy == "none" and BUDGET not in fixed:
                        tried.append(self._within_budget(found[key], limit))
                        found[*key, "budget"] = tried[-1]
                legal = [one for one in tried if one is not None]
                crowded = crowded or (bool(legal) and min(one.bytes for one in legal) > limit)
        return [one for one in found.values() if one is not None]

    def _within_budget(self, whole: Candidate | None, limit: float) -> Candidate | None:
        """Where blocks can't keep everything: with the largest `trainer.activation_budget` that fits."""
        if whole is None or whole.bytes <= limit:
            return None
        rank = max(whole.plan.cost.ranks, key=lambda rank: rank.total)
        share = 1 - (rank.total - limit) / rank.activations
        for step in range(TRIES):
            budget = round((math.floor(share / STEP) - step) * STEP, 2)
            found = self.planned({**whole.settings, BUDGET: budget}) if 0 < budget < 1 else None
            if found is None or found.bytes <= limit:
                return found if found is not None and len(set(found.plan.job.policies)) > 1 else None
        return None


def divisors(number: int) -> list[int]:
    """Of a positive number, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def written(value: object) -> str:
    """A value as an override has it."""
    return "null" if value is None else str(value)


def described(settings: Settings) -> str:
    """Settings in one line, as overrides; a budget only where there is one."""
    return " ".join(f"{key}={value}" for key, value in settings.items() if value is not None)


def table_of(tuned: Tuned) -> Table:
    """The fastest settings, best first, and the given ones."""
    title = "Fastest first, by prediction"
    table = Table(
        right("ZeRO"), right("micro-batches"), "activations", right("planned GiB"), right("speed"), "",
        title=title, title_justify="left", box=box.SIMPLE,
    )  # fmt: skip
    fastest = min(one.seconds for one in tuned.fitting)
    shown = tuned.fitting[:SHOWN]
    if tuned.as_given is not None and tuned.as_given not in shown:
        shown = [*shown, tuned.as_given]
    for one in shown:
        zero, micro, activation, budget = one.settings.values()
        remark = "as given" if one is tuned.as_given else ""
        remark += ", does not fit" if one.bytes > tuned.limit else ""
        kept = activation if budget is None else f"{budget:.0%} kept"
        speed = f"{fastest / one.seconds:.1%}"
        table.add_row(str(zero), f"{one.plan.job.micro_batches} × {micro}", kept, gib(one.bytes), speed, remark)
    return table
