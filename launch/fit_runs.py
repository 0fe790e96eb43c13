"""Sort finished runs into sweeps and fit scaling laws to them, for `meshloom fit`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from yaml import YAMLError

from ..config.keys import Side
from ..config.problems import ConfigError, Problem
from ..config.words import counted
from ..optim.scaling import fitting
from ..optim.scaling.fitting import CriticalFit, LossFit, Optimum, PowerLaw
from ..trainer.identity import METRICS
from ..trainer.schema import RunConfig
from ..trainer.sides import key_sides
from ..trainer.typed import plain_config, typed_config
from .run_metrics import Metrics

NAMES = {"N": "parameters", "D": "tokens", "B": "batch"}
UNITS = "N: parameters without embedding and head; D, B: tokens; L: nats per token"
T = TypeVar("T")
VARIABLES = frozenset(
    {
        *("recipe", "optim.lr", "batch.samples", "trainer.steps", "trainer.tokens", "trainer.eval_every"),
        *(f"model.{size}" for size in ("name", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim")),
        *(f"model.{rule}" for rule in ("init_std", "mup_base", "mup_embedding", "mup_residual")),  # which follow the size
    }
)
"""Keys of the recipe that a law's variables stand for, or that no loss depends on."""


@dataclass(frozen=True)
class FinishedRun:
    """One run, by the variables of the laws.

    parameters  N, without embedding and head; tokens: D; batch: B in tokens, None where it changed during the run
    lr          optim.lr
    loss        the last evaluation's, or else the mean of the last twentieth of the training losses
    curve       (steps, losses): evaluations where there are enough, or else training losses, smoothed
    others      key → value of everything else that decides about the loss
    """

    folder: Path
    parameters: int
    tokens: float
    batch: float | None
    lr: float
    loss: float
    curve: tuple[np.ndarray, np.ndarray]
    others: Mapping[str, str]


@dataclass(frozen=True)
class Sweep:
    """A setting tried at several values, all else equal. at: the values of N, D, B that were equal."""

    at: dict[str, float]
    values: list[float]
    losses: list[float]

    @property
    def best(self) -> Optimum:
        """The optimum: the value with the lowest loss."""
        return fitting.optimum(self.values, self.losses)


@dataclass
class Fits:
    """The fitted laws. `missing`: law → why it could not be fitted."""

    lr_sweeps: list[Sweep]
    batch_sweeps: list[Sweep]
    cells: list[FinishedRun]
    missing: dict[str, str]
    lr: PowerLaw | None = None
    batch: PowerLaw | None = None
    loss: LossFit | None = None
    critical: tuple[PowerLaw, dict[float, CriticalFit]] | None = None
    curves: Mapping[float, tuple[np.ndarray, np.ndarray]] | None = None


def read_runs(paths: Iterable[Path], varies: Collection[str] = ()) -> list[FinishedRun]:
    """Read every finished run in or under these folders.

    Raises ConfigError for each that is not a run or not finished, and for each key in which the runs differ that is neither a
    variable of the laws nor among `varies`.
    """
    problems: list[Problem] = []
    runs: list[FinishedRun] = []
    for path in paths:
        folders = sorted(file.parent for file in path.rglob("metrics.jsonl"))
        if not folders:
            problems.append(Problem(str(path), "holds no run", "give folders with config.yaml and metrics.jsonl"))
        for folder in folders:
            try:
                runs.append(_read(folder))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, YAMLError, InstantiationException) as error:
                problems.append(Problem(str(folder), f"can't be read as a finished run: {error}", "leave it out"))
    problems = problems or list(_differences(runs, varies))
    if problems:
        raise ConfigError(problems)
    return runs


def _differences(runs: Sequence[FinishedRun], varies: Collection[str]) -> Iterator[Problem]:
    """Yield a problem for each key, other than the laws' variables, that has several values and is not named."""
    for key in dict.fromkeys(key for run in runs for key in run.others):
        counts = Counter(run.others.get(key, "absent") for run in runs)
        if len(counts) > 1 and key not in varies:
            shown = ", ".join(f"{value} ({counted(count, 'run')})" for value, count in counts.most_common(4))
            fix = f"give the folders of one value, or --varies {key} if it decides nothing"
            yield Problem(key, f"differs between the runs: {shown}", fix)


def _others(run: RunConfig) -> dict[str, str]:
    plain = plain_config(run)
    recipe = [key for key, side in key_sides(run).items() if side is Side.RECIPE and key not in VARIABLES]
    return {key: str(functools.reduce(_member, key.split("."), plain)) for key in recipe}


def _member(node: Any, name: str) -> Any:
    return node.get(name) if isinstance(node, dict) else None


def _read(folder: Path) -> FinishedRun:
    from ..trainer.automatic import hidden_parameters

    config: Any = OmegaConf.load(folder / "config.yaml")
    run, untyped = typed_config(config)
    if untyped:
        raise ConfigError(untyped)
    metrics = Metrics.read_undamaged(folder / METRICS)
    steps = [row for row in metrics.steps if "loss" in row and "batch_samples" in row]
    evaluations = [row for row in metrics.evaluations if "eval_loss" in row]
    if not steps:
        raise ValueError(f"{METRICS} has no steps")
    last = max(steps + evaluations, key=lambda row: row["step"])  # with logging.every=10 the last step may have no row
    unit = "tokens" if config.trainer.steps is None else "steps"
    length, reached = config.trainer[unit], last["tokens" if config.trainer.steps is None else "step"]
    if reached < length:
        raise ValueError(f"it stopped at {reached} of {length} {unit}")
    batches = {row["batch_samples"] for row in steps}
    train = np.array([row["loss"] for row in steps])
    tail = max(1, len(train) // 20)
    if len(evaluations) >= 4:
        curve = np.array([row["step"] for row in evaluations]), np.array([row["eval_loss"] for row in evaluations])
    else:
        curve = np.array([row["step"] for row in steps]), _smoothed(train)
    return FinishedRun(
        folder=folder,
        parameters=hidden_parameters(run),
        tokens=float(last["tokens"]),
        batch=batches.pop() * float(config.data.seq_len) if len(batches) == 1 else None,
        lr=float(config.optim.lr),
        loss=float(evaluations[-1]["eval_loss"] if evaluations else train[-tail:].mean()),
        curve=curve,
        others=_others(run),
    )


def _smoothed(losses: np.ndarray) -> np.ndarray:
    """Smooth a curve by means over a fortieth of the way so far to either side: wide where it is flat, narrow where steep."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    at = np.arange(len(losses))
    reach = np.minimum(at // 40, len(losses) - 1 - at)
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _grouped(items: Iterable[T], key: Callable[[T], tuple[float, ...]]) -> dict[tuple[float, ...], list[T]]:
    groups: dict[tuple[float, ...], list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _best(runs: Iterable[FinishedRun]) -> FinishedRun:
    return min(runs, key=lambda run: run.loss)


def _sweeps(runs: Iterable[FinishedRun], value: Callable[[FinishedRun], float], names: str) -> list[Sweep]:
    """Group runs that differ only in `value`, with three values or more. Of runs with an equal value, keep the best."""

    def at(run: FinishedRun) -> tuple[float, ...]:
        return tuple(float(getattr(run, NAMES[name])) for name in names)

    found: list[Sweep] = []
    for key, members in sorted(_grouped(runs, at).items()):
        best = {v[0]: _best(same) for v, same in sorted(_grouped(members, lambda run: (value(run),)).items())}
        if len(best) >= 3:
            found.append(Sweep(dict(zip(names, key, strict=True)), list(best), [run.loss for run in best.values()]))
    return found


def fit_all(runs: Sequence[FinishedRun]) -> Fits:
    """Fit every law that the runs allow."""
    steady = [run for run in runs if run.batch is not None]
    lr_sweeps = _sweeps(steady, lambda run: run.lr, "NDB")
    batch_sweeps = _sweeps(steady, lambda run: run.batch or 0.0, "ND")
    cells = [_best(same) for same in _grouped(runs, lambda run: (run.parameters, run.tokens)).values()]
    fits = Fits(lr_sweeps, batch_sweeps, cells, {})

    def attempt(name: str, fit: Callable[[], T]) -> T | None:
        try:
            return fit()
        except ValueError as error:
            fits.missing[name] = str(error)
            return None

    fits.lr = attempt("learning rate", lambda: _optima_law(lr_sweeps))
    fits.batch = attempt("batch", lambda: _optima_law(batch_sweeps))
    fits.loss = attempt(
        "loss", lambda: fitting.fit_loss([c.parameters for c in cells], [c.tokens for c in cells], [c.loss for c in cells])
    )
    fits.curves = _curves(steady)
    fits.critical = attempt("critical batch", lambda: _critical_law(fits.curves or {}))
    return fits


def _optima_law(sweeps: Sequence[Sweep]) -> PowerLaw:
    """Fit a power law to the optima, in those of N, D and B that vary. Optima at the edge of a sweep are left out."""
    inside = [sweep for sweep in sweeps if sweep.best.inside]
    if not inside:
        edge = " (every sweep has its best value at an edge: widen them)" if sweeps else ""
        raise ValueError(f"no sweep of three values or more, all else equal, has its optimum inside{edge}")
    names = [name for name in inside[0].at if len({sweep.at[name] for sweep in inside}) > 1]
    if not names:
        raise ValueError("the optimum was found in one setting only: sweep again at another size, length or batch")
    factors = {name: [sweep.at[name] for sweep in inside] for name in names}
    return fitting.fit_power_law([sweep.best.value for sweep in inside], **factors)


def _curves(runs: Sequence[FinishedRun]) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Return batch → loss curve of its best run, for the model size that was trained with most batches."""
    sizes = _grouped(runs, lambda run: (run.parameters,))
    if not sizes:
        return {}
    most = max(sizes.values(), key=lambda members: len({run.batch for run in members}))
    return {batch[0]: _best(same).curve for batch, same in sorted(_grouped(most, lambda run: (run.batch or 0.0,)).items())}


def _critical_law(curves: Mapping[float, tuple[np.ndarray, np.ndarray]]) -> tuple[PowerLaw, dict[float, CriticalFit]]:
    if len(curves) < 2:
        raise ValueError("the critical batch needs runs of one model at two batch sizes or more")
    lowest = max(float(losses.min()) for _, losses in curves.values())
    highest = min(float(losses[0]) for _, losses in curves.values())
    # The first fall tells about initialisation, not about batches; the second half of the way down is used.
    levels = np.linspace(lowest + 0.5 * (highest - lowest), lowest, 8) if highest > lowest else np.array([lowest])
    return fitting.fit_critical_law(curves, levels)
