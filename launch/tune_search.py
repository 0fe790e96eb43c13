"""The search of `meshloom tune`: settings that change speed and memory alone, planned, and ranked by prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config.problems import ConfigError, Problem
from ..optim.batch.config import FITTED
from ..parallel.config import ParallelConfig
from ..parallel.policies import MIXED
from ..planner.checkpoint_needs import fewer_snapshots
from ..planner.cluster import load_cluster
from ..planner.prediction import usable_bytes
from ..planner.tables import GIB, gib
from ..trainer.automatic import resolve_automatic
from ..trainer.fitting import Fitting
from ..trainer.launching import planned_processes
from ..trainer.relations import Start
from ..trainer.resolve import compose_config
from ..trainer.schema import RunConfig
from ..trainer.stages.written import written_value
from ..trainer.typed import replace_keys, value_of
from ..trainer.validate import run_problems
from .plan_cluster import predict
from .plan_documents import step_documents
from .planning import Plan, checked_plan
from .shortages import shortages
from .tuned_keys import BUDGET, HYBRID_KEYS, KEYS
from .typed_words import changed_words, given_keys, micro_is_fixed

ALIKE = 0.01
"""Predictions that differ by less say nothing about which is faster: steps of one and the same run differ by more."""
REFERENCE = "h200"
"""The cluster whose rates predictions are made with where none is chosen: those of another are mostly in like proportion."""
STEP = 0.05
"""Budgets are multiples of this."""
TRIES = 3
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A planned candidate. settings: key → value, of KEYS or HYBRID_KEYS; seconds: predicted for a step."""

    settings: Settings
    plan: Plan
    seconds: float

    @property
    def bytes(self) -> int:
        """Peak bytes of the rank that needs most."""
        return self.plan.bytes

    @property
    def speed(self) -> float:
        """Predicted tokens per second of a process."""
        return self.plan.samples * self.plan.job.seq_len / self.seconds / self.plan.processes

    @property
    def host(self) -> int:
        """Bytes of host memory that a process takes: for what is offloaded, and for snapshots of checkpoints."""
        return self.plan.away.host + self.plan.needs.host

    @property
    def disk(self) -> int:
        """Bytes of a local disk that a process takes for what is offloaded."""
        return self.plan.away.disk


@dataclass(frozen=True)
class Tuned:
    """The result of `meshloom tune`.

    given     the settings of the command line and the recipe
    fitting   fastest first
    as_given  the given settings, whether or not they fit; None where they can't run
    limit     bytes of a GPU that a plan may take
    host      bytes of host memory that a process may; None where it is not known
    notes     remarks on the figures
    """

    config: RunConfig
    given: Settings
    fitting: list[Candidate]
    as_given: Candidate | None
    limit: float
    host: float | None
    notes: list[str]

    def fits(self, candidate: Candidate) -> bool:
        """Return whether a candidate fits on the GPUs and, as far as that is known, in host memory."""
        return _fits(candidate, self.limit, self.host)

    def changes(self, candidate: Candidate) -> list[str]:
        """Return the overrides that turn the given run into this candidate."""
        return changed_words(candidate.settings, self.given)


def _nobody_knows() -> str:
    return "--memory does not say what the GPUs can"


def tune(
    overrides: Sequence[str],
    memory: float,
    config_dir: str | None = None,
    *,
    host: float | None = None,
    fused_swiglu_blocker: Callable[[], str | None] = _nobody_knows,
) -> Tuned:
    """Plan every setting and rank those that fit.

    memory               bytes of a GPU
    host                 bytes of host memory of a machine, which its processes share; None: not known
    fused_swiglu_blocker  called once, if the answer matters: returns why the GPUs can't fuse SwiGLU, None if they can

    Raises ConfigError with the problems of the given run if no setting can run, and with the smallest if none fits.
    """
    limit = usable_bytes(memory)
    config, known = compose_config(overrides, config_dir)
    if known:  # no setting mends a key that is not there
        raise ConfigError(run_problems(config, planned_processes(config.launch), known))
    if config.left_to_laws:
        config, problems = resolve_automatic(config)
        if problems:
            raise ConfigError(problems)
    left = config.left_to_plan
    config = fitted_to(config, memory)
    hybrid = config.parallel.hdp != "none"
    search = _Search(config, fused_swiglu_blocker, step_documents(config, "data") if hybrid else None)
    given = {key: value_of(config, key) for key in (HYBRID_KEYS if hybrid else KEYS)}
    fixed = given_keys(overrides) & set(given) - set(left)
    notes = [f"{', '.join(sorted(fixed))} as the command line says"] if fixed else []
    if not hybrid and "batch.micro" not in fixed and (why := micro_is_fixed(config)):
        fixed.add("batch.micro")
        notes.append(f"batch.micro={given['batch.micro']} stays: {why}")
    found = search.all(given, fixed, limit)
    if not found:
        raise search.refusals[tuple(given.values())]
    local = found[0].plan.processes // config.launch.most_nodes  # processes of a machine
    share = None if host is None else host / local
    fitting = ranked([one for one in found if _fits(one, limit, share)])
    if not fitting:
        raise ConfigError([_too_large(found, limit, memory, share, local)])
    best = fitting[0].plan
    notes += search.notes
    if share is not None:
        notes += map(str, shortages(config, best.needs, best.away, local, local * share))
    elif fitting[0].host + best.away.disk:
        places = [(fitting[0].host, "of host memory"), (best.away.disk, "on disk")]
        needs = " and ".join(f"{gib(local * size)} GiB {where}" for size, where in places if size)
        snapshots = f" ({gib(local * best.needs.host)} for snapshots of checkpoints)" if best.needs.host else ""
        notes.append(f"the fastest needs {needs} on each machine{snapshots}, of which --memory says nothing")
    notes += [note for note in best.notes if note.startswith("data")]
    if any(rank.optimizer is None for rank in best.cost.ranks):
        notes.append("what this optimizer keeps is not known before it runs, and not in these figures")
    notes.append("only the order of the predicted speeds means something; within 1 %, what takes less memory comes first")
    as_given = next((one for one in found if one.settings == given), None)
    return Tuned(config, {**given, **dict.fromkeys(left, FITTED)}, fitting, as_given, limit, share, notes)


def fitted_to(config: RunConfig, memory: float) -> RunConfig:
    """Return the config with numbers in place of `auto`, for GPUs of so many bytes. Raises ConfigError."""
    processes = planned_processes(config.launch)
    cluster = replace(load_cluster([f"cluster={REFERENCE}"]), memory=memory / GIB)
    config, problems = Fitting(lambda _: cluster).resolve(config, Start(processes), sound=not config.problems())
    if problems:
        raise ConfigError(problems)
    return config


def _fits(one: Candidate, limit: float, host: float | None) -> bool:
    return one.bytes <= limit and (host is None or one.host <= host)


def _too_large(found: Sequence[Candidate], limit: float, memory: float, host: float | None, local: int) -> Problem:
    """Explain why none of these fits, and what to change. host: of a process; local: processes of a machine."""
    least = min(found, key=lambda one: one.bytes)
    if least.bytes > limit:
        message = f"nothing fits: the least, {described(least.settings)}, is planned at {gib(least.bytes)} GiB"
        allowed = f"a plan may take {gib(max(0.0, limit))} of {gib(memory)} GiB"
        return Problem("--memory", f"{message}, and {allowed}", _less_gpu(least.plan.parallel))
    least = min((one for one in found if one.bytes <= limit), key=lambda one: one.host)
    assert host is not None, "on the GPU it fits"
    needs, parallel = least.plan.needs, least.plan.parallel
    snapshots = f", {gib(local * needs.host)} of them for snapshots" if needs.host else ""
    takes = f"takes {gib(local * least.host)} GiB on each machine{snapshots}"
    message = f"nothing fits into host memory: {described(least.settings)} {takes}, and {gib(local * host)} GiB are free here"
    dealt = least.plan.dealt
    if dealt is not None and dealt.pinned_bytes and needs.host <= host:
        message += f"; rows may pin {gib(local * dealt.pinned_bytes)} of them for activations"
        return Problem("parallel.hdp_offload", message, "use false, or fewer parallel.hdp_tokens")
    if least.plan.away.host <= host:
        return Problem("checkpoint.host_memory_gib", message, fewer_snapshots(needs))
    ways = ["use more machines"]
    if parallel.offload != "nvme":
        engine = "" if parallel.engine == "deepspeed" else "parallel.engine=deepspeed "
        ways.append(f"{engine}parallel.zero=3 parallel.offload=nvme")
    if parallel.offload_weights != "none":
        ways.append("parallel.offload_weights=none")
    return Problem("parallel.offload", message, ", or ".join(ways))


def _less_gpu(parallel: ParallelConfig) -> str:
    """Return the fix that lets a run of this engine do with smaller GPUs, besides what was tried."""
    ways = ["more processes"]
    if parallel.engine == "deepspeed":
        if parallel.offload == "none":
            ways += ["parallel.offload=cpu", "parallel.engine=torch parallel.tp=2"]
        elif parallel.offload_weights == "none":
            ways.append("parallel.zero=3 parallel.offload_weights=cpu")
    else:
        if parallel.offload == "none":
            ways.append(f"parallel.tp={2 * parallel.tp}")
        if parallel.offload == "none" and max(parallel.tp, parallel.pp, parallel.cp) == 1:
            ways.append("parallel.offload=cpu")
    return f"use {' or '.join([', '.join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)}"


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Rank candidates: fastest first; among those that the prediction can't tell apart, least memory first."""
    fastest = min((one.seconds for one in candidates), default=1.0)
    return sorted(candidates, key=lambda one: (int((one.seconds / fastest - 1) / ALIKE), one.bytes, one.seconds))


class _Search:
    """The planner of settings of one config. refusals: why some can't run, by their values; notes: assumptions of all plans."""

    def __init__(
        self, config: RunConfig, fused_swiglu_blocker: Callable[[], str | None], documents: Sequence[int] | None
    ) -> None:
        """documents: lengths of those of the first step, where they are dealt one by one."""
        self._config, self._documents = config, documents
        self._cluster = load_cluster([f"cluster={REFERENCE}"])
        self._fused_swiglu_blocker = fused_swiglu_blocker
        self._fuse: bool | None = None  # unknown, while nothing has been planned that the answer matters to
        self.refusals: dict[tuple[Any, ...], ConfigError] = {}
        self.notes: list[str] = []

    def planned(self, settings: Settings) -> Candidate | None:
        """Plan these settings. Return None if they can't run."""
        config = replace_keys(self._config, settings)
        try:
            plan = checked_plan(config, fused=self._fuse is not False, documents=self._documents)
            if (plan.job.fused or plan.job.fused_experts) and self._fuse is None and not self._fuses():
                plan = checked_plan(config, fused=False, documents=self._documents)
        except ConfigError as error:
            self.refusals[tuple(settings.values())] = error
            return None
        found = predict(plan, config, replace(self._cluster, gpus=plan.processes))
        return Candidate(settings, plan, found.seconds)

    def _fuses(self) -> bool:
        reason = self._fused_swiglu_blocker()
        self._fuse = reason is None
        how = "computed inside its products, as the GPUs here can" if reason is None else f"planned as plain: {reason}"
        self.notes.append(f"SwiGLU is {how}")
        return self._fuse

    def all(self, given: Settings, fixed: set[str], limit: float) -> list[Candidate]:
        """Plan every legal setting of the keys that are not fixed, and the given one if that is legal.

        Beyond the first micro-batch size that does not fit, only the largest is tried: alone in its step, it needs no memory to
        accumulate gradients.
        """
        parallel = self._config.parallel
        model = max(1, parallel.pp * parallel.cp * parallel.tp)
        processes = planned_processes(self._config.launch)
        data = max(1, processes // model)
        zero, micro, activation, budget = given.values()
        # Through a pipeline all stages are the same, and so they are on one rank of the torch engine that offloads nothing.
        island = data * parallel.cp // self._config.islands_on(processes)
        alone = island <= 1 and parallel.engine != "deepspeed" and parallel.offload == "none"
        alike = "parallel.zero" in fixed or parallel.pp > 1 or alone
        if {"batch.micro", "parallel.hdp_tokens"} & fixed:
            micros = [micro]
        elif self._documents is not None:
            micros = row_sizes(sum(self._documents), self._config.data.seq_len, data)
        else:
            samples = self._config.batch.samples  # where they are not known no plan is made, and the refusal says so
            micros = divisors(-(-samples // data)) if isinstance(samples, int) else [micro]
        found = {tuple(given.values()): self.planned(given)}
        for stage in [zero] if alike else sorted({zero, 1, 2, 3}):
            crowded = False
            for size in micros:
                if crowded and size != micros[-1]:
                    continue
                tried: list[Candidate | None] = []
                for policy in [activation] if "trainer.activation" in fixed else dict.fromkeys([*MIXED, activation]):
                    settings: dict[str, Any] = dict(
                        zip(given, (stage, size, policy, budget if BUDGET in fixed else None), strict=True)
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
        """Fit a candidate that is too large: use the largest `trainer.activation_budget` with which it fits."""
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


def row_sizes(tokens: int, seq_len: int, ranks: int) -> list[int]:
    """Return capacities of rows to try, ascending: powers of two in which all ranks together hold the longest document.

    tokens: of the documents of a step, of which the largest row holds a rank's part
    """
    least = max(1, -(-seq_len // ranks), min(128, seq_len))
    most = max(least, -(-tokens // ranks))
    sizes = [1 << power for power in range((least - 1).bit_length(), (most - 1).bit_length() + 1)]
    return sizes or [least]


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def described(settings: Settings) -> str:
    """Format settings in one line, as overrides; a budget only where there is one."""
    return " ".join(f"{key}={written_value(value)}" for key, value in settings.items() if value is not None)
