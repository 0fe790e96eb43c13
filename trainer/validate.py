"""Everything that is wrong with a run, found before a process group or any GPU memory is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..checkpoint.config import checkpoint_problems
from ..config.problems import ConfigError, Problem
from ..config.validate import PRECISIONS, config_problems
from ..models.protocol import decoder_shape
from ..optim.build import build_controller, build_schedule, compares_halves
from ..optim.optimizers.parameters import NamedParameter, Unsharded
from ..optim.progress import Progress
from ..parallel.engines import engine_problems
from ..parallel.gradient_noise import moments_problems
from ..parallel.layout import Layout, layout_problems
from ..parallel.legality import Work, key_problems, layout_and_model_problems, model_problems
from ..parallel.pipeline.stages import SCHEDULES
from ..parallel.policies import block_policies
from ..parallel.torch.float8 import float8_size_problems
from .automatic import resolve_automatic
from .build import (
    Parts,
    batch_divisor,
    build_coupling,
    build_data,
    build_horizon,
    build_model,
    checkpoint_folder,
    engine_settings,
    optimizer_factory,
)
from .hooks.base import hook_problems
from .hooks.loggers.config import logging_problems


def run_problems(config: DictConfig, world_size: int) -> list[Problem]:
    """Every problem of a config on this many processes. Nothing is built that takes memory, reads data or writes.

    Values that `config` leaves to a law (auto:…) are replaced by their numbers, in place.
    """
    problems = config_problems(config)
    if OmegaConf.missing_keys(config):
        return problems
    parts = Parts.of(config)
    planned = world_size > 0 and not layout_problems(parts.parallel, world_size)
    data_size = Layout.plan(parts.parallel, world_size).data_size if planned else 1
    unanswered = resolve_automatic(config, data_size)
    if unanswered:  # what depends on the missing numbers can't be judged
        return [*problems, *unanswered]
    if world_size > 0:
        judged = parts.parallel.engine == "torch" and not any(p.key.startswith(("model.", "data.", "batch.")) for p in problems)
        work = layout_work(config, parts) if judged else None
        if work is not None:
            layout = layout_and_model_problems(parts.parallel, work, world_size)
        else:
            layout = [*layout_problems(parts.parallel, world_size), *key_problems(parts.parallel)]
        problems += layout or batch_problems(config.batch, data_size)
        problems += asked("optim", lambda: _engine_problems(config, parts, world_size))
    problems += [*checkpoint_problems(parts.checkpoint), *asked("checkpoint", lambda: _folder_problems(config))]
    problems += logging_problems(parts.logging)
    problems += hook_problems(parts.trainer.hooks)
    problems += asked("data", lambda: build_data(config).problems())
    problems += asked("optim", lambda: _optimizer_problems(config))
    if not any(problem.key.startswith("model") for problem in problems):
        problems += asked("model", lambda: _model_problems(config))
    if not any(problem.key.startswith(("trainer.", "data", "optim")) for problem in problems):
        problems += asked("schedule", lambda: _schedule_problems(config))
        problems += asked("batch", lambda: _controller_problems(config, data_size))
    return problems


def layout_work(config: DictConfig, parts: Parts) -> Work | None:
    """What the layout has to carry; None where a model or data of the user's own does not say it by the decoder's keys."""
    shape = {key: config.model.get(key) for key in ("layers", "heads", "kv_heads", "ffn_dim")}
    seq_len, micro = config.data.get("seq_len"), config.batch.get("micro_max") or config.batch.get("micro")
    if not all(isinstance(size, int) for size in (*shape.values(), seq_len, micro)):
        return None
    return Work(
        **shape,
        vocabulary=config.model.get("vocabulary"),
        seq_len=seq_len,
        micro=micro,
        samples=config.batch.samples if config.batch.name == "fixed" else None,
        activation=parts.trainer.activation,
        compile=parts.trainer.compile,
    )


def batch_problems(batch: Any, data_size: int) -> list[Problem]:
    """Whether a fixed global batch can be dealt in whole micro-batches to the data-parallel processes."""
    problems = [
        Problem(f"batch.{key}", f"{batch[key]} is not a number of samples", "use 1 or more")
        for key in ("samples", "micro")
        if key in batch and isinstance(batch[key], int) and batch[key] < 1
    ]
    if problems or batch.name != "fixed" or not isinstance(batch.micro, int):
        return problems  # the other controllers answer for themselves
    unit = batch.micro * data_size
    if batch.samples % unit:
        below = batch.samples // unit * unit
        fits = f"{below} or {below + unit}" if below else str(unit)
        share = batch.samples // data_size
        smaller = max((n for n in range(1, batch.micro) if share % n == 0), default=0) if batch.samples % data_size == 0 else 0
        fix = f"use {fits}" + (f", or batch.micro={smaller}" if smaller else "")
        text = f"batch.samples={batch.samples} is not a multiple of batch.micro × data-parallel size = {unit}"
        problems.append(Problem("batch.samples", text, fix))
    return problems


def _schedule_problems(config: DictConfig) -> list[Problem]:
    horizon = build_horizon(config, config.data.seq_len)
    return build_schedule(config.schedule, config.optim.lr, horizon).problems()


def _controller_problems(config: DictConfig, data_size: int) -> list[Problem]:
    if not isinstance(config.batch.micro, int) or config.batch.micro < 1:
        return []  # already said
    horizon = build_horizon(config, config.data.seq_len)
    controller = build_controller(config.batch, horizon, batch_divisor(config, data_size))
    measures = controller.needs_statistics or controller.needs_loss
    if config.batch.get("micro_max") is not None and config.parallel.pp > 1:
        fix = "leave it out, or use parallel.pp=1"
        return [Problem("batch.micro_max", "a pipeline's micro-batches are of one size", fix)]
    found = build_coupling(config).problems(measures, config.schedule.get("name", ""))
    if controller.needs_statistics:
        if controller.next_batch(Progress()) < 2 * config.batch.micro:
            message = "a batch of one micro-batch has nothing to compare, so its noise would never be measured"
            found.append(Problem("batch.samples", message, "double it, or halve batch.micro"))
        tied = bool(config.model.get("tied", False))
        found += moments_problems(Parts.of(config).parallel, tied, controller.needs_projections)
    if compares_halves(config.optim):
        if config.parallel.engine != "torch":
            fix = "use parallel.engine=torch, or another optimizer"
            found.append(Problem("optim", "AGVM compares halves of a batch's gradient, which DeepSpeed does not give", fix))
        if config.parallel.pp > 1:
            fix = "use parallel.pp=1, or another optimizer"
            found.append(Problem("optim", "AGVM compares halves of each rank's micro-batches, which a pipeline mixes", fix))
        if controller.least < 2 * config.batch.micro * data_size:
            fix = "halve batch.micro, or double the smallest batch"
            found.append(Problem("batch.micro", "AGVM needs two micro-batches or more on every rank", fix))
    return found if config.batch.name == "fixed" else [*controller.problems(), *found]


def _folder_problems(config: DictConfig) -> list[Problem]:
    """Whether the place for checkpoints is one that can be spoken to."""
    checkpoint_folder(config)
    return []


def _optimizer_problems(config: DictConfig) -> list[Problem]:
    """Whether the optimizer takes its keys: it is built over one small parameter."""
    parameter = NamedParameter("probe.weight", torch.nn.Parameter(torch.zeros(2, 2)), (2, 2))
    optimizer_factory(config)([parameter], Unsharded())
    return []


def _model_problems(config: DictConfig) -> list[Problem]:
    """Whether the model takes its keys (it is built on the meta device), can be cut, and its blocks keep to their budget."""
    model = build_model(config, vocabulary=2)
    parts = Parts.of(config)
    found = model_problems(model, parts.parallel, engine_settings(config))
    if found:
        return found
    budget, parallel = parts.trainer.activation_budget, parts.parallel
    if parts.trainer.float8 != "none":
        seq_len, micro = config.data.get("seq_len"), config.batch.get("micro")
        known = isinstance(seq_len, int) and isinstance(micro, int) and parallel.cp > 0
        found += float8_size_problems(model.block_modules().values(), micro * seq_len // parallel.cp if known else None)
    if budget is None or not 0 < budget <= 1 or parallel.schedule not in SCHEDULES or config.precision not in PRECISIONS:
        return found
    try:
        block_policies(decoder_shape(model), parallel, engine_settings(config))
    except ValueError as error:
        found.append(Problem("trainer.activation_budget", str(error), "give it more"))
    return found


def _engine_problems(config: DictConfig, parts: Parts, world_size: int) -> list[Problem]:
    return engine_problems(
        parts.parallel,
        optimizer_factory(config),
        precision=config.precision,
        float8=parts.trainer.float8,
        world_size=world_size,
    )


def asked(group: str, question: Callable[[], Iterable[Problem]]) -> list[Problem]:
    """The answer of an object of the group; a node that can't be turned into an object is a problem too."""
    try:
        return list(question())
    except ConfigError as error:
        return error.problems
    except InstantiationException as error:
        cause = error.__cause__ or error
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        return [Problem(group, f"can't be built: {reason}", f"check {group}._target_ and the keys of its node")]
    except OSError as error:  # a file that a key names and that can't even be looked for
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error) or type(error).__name__
        return [Problem(group, reason, f"check the keys of {group}")]
    except (ImportError, TypeError, ValueError, KeyError, OmegaConfBaseException) as error:
        return [Problem(group, f"can't be built: {error}", f"check the keys of {group}")]
