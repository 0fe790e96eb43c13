"""What is wrong with a config that can be seen in the config alone, without a world size or any object built from it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .duration import Duration
from .problems import Problem

_YEAR = 365 * 24 * 3600  # clocks of collectives overflow far beyond it
PRECISIONS = ("fp32", "bf16", "fp64")
ACTIVATIONS = ("none", "selective", "full", "offload")


def config_problems(config: DictConfig) -> list[Problem]:
    """Every problem of the config's own values. Keys that are not set are named, and not looked at further."""
    unset = sorted(OmegaConf.missing_keys(config))
    problems = [Problem(key, "is not set", f"give it as {key}=…") for key in unset]
    if any("." not in key for key in unset):
        return problems
    return [
        *problems,
        *_run_problems(config),
        *_trainer_problems(config.trainer),
        *(_model_problems(config.model) if not any(key.startswith("model.") for key in unset) else ()),
        *_launch_problems(config.launch),
    ]


def _run_problems(config: DictConfig) -> Iterator[Problem]:
    if config.precision not in PRECISIONS:
        yield Problem("precision", f"there is no '{config.precision}'", f"use {', '.join(PRECISIONS)}")
    if not 0 <= config.seed < 2**63:
        yield Problem("seed", f"{config.seed} is no seed", "use 0 up to less than 2^63")
    if not str(config.output_dir).strip():
        yield Problem("output_dir", "is empty", "give a folder")
    if "://" in str(config.output_dir):
        fix = "give a folder, and the URL as checkpoint.folder: checkpoints may go there"
        yield Problem("output_dir", f"'{config.output_dir}' is a URL, and metrics are written to a folder", fix)
    if not config.resume:
        yield Problem("resume", "is empty", "use auto, none, or the path of a checkpoint")
    lr = config.optim.get("lr")
    if isinstance(lr, float) and not math.isfinite(lr):
        yield Problem("optim.lr", f"{lr} is not a learning rate", "use a number, or auto:step_law")
    if not 0 < config.parallel.timeout <= _YEAR:
        yield Problem(
            "parallel.timeout", f"{config.parallel.timeout} is not a time", "use seconds, a year at most, for example 600"
        )
    if config.logging.every < 1:
        yield Problem("logging.every", f"{config.logging.every} is not a number of steps", "use 1 for a row every step")


def _trainer_problems(trainer: DictConfig) -> Iterator[Problem]:
    if trainer.steps is None and trainer.tokens is None:
        yield Problem("trainer.steps", "the run has no length", "give trainer.steps or trainer.tokens")
    if trainer.steps is not None and trainer.tokens is not None:
        yield Problem("trainer.steps", "trainer.tokens says the run's length too", "set one of them to null")
    for key in ("steps", "tokens"):
        if trainer[key] is not None and trainer[key] < 1:
            yield Problem(f"trainer.{key}", f"{trainer[key]} is not a length", "use 1 or more")
    if trainer.max_grad_norm is not None and not trainer.max_grad_norm > 0:
        yield Problem("trainer.max_grad_norm", f"{trainer.max_grad_norm} stops all learning", "use null to never clip")
    if trainer.eval_every is not None:
        yield from _eval_every_problems(trainer.eval_every)
    if trainer.eval_samples < 1:
        yield Problem("trainer.eval_samples", f"{trainer.eval_samples} evaluates nothing", "use trainer.eval_every=0 for never")
    if trainer.profile_step is not None and not 1 <= trainer.profile_step <= (trainer.steps or trainer.profile_step):
        length = f" of {trainer.steps}" if trainer.steps else ""
        yield Problem("trainer.profile_step", f"there is no step {trainer.profile_step}{length}", "count from 1; null: none")
    if trainer.sample_tokens < 1:
        yield Problem("trainer.sample_tokens", f"{trainer.sample_tokens} is no text", "use trainer.sample_prompt=null for none")
    if trainer.activation not in ACTIVATIONS:
        yield Problem("trainer.activation", f"there is no '{trainer.activation}'", f"use {', '.join(ACTIVATIONS)}")
    budget = trainer.activation_budget
    if budget is not None and not 0 < budget <= 1:
        yield Problem("trainer.activation_budget", f"{budget} is not a share", "use a number in (0, 1], or null")
    elif budget is not None and trainer.activation != "none":
        fix = "use trainer.activation=none: the budget chooses among the others"
        yield Problem("trainer.activation_budget", f"trainer.activation={trainer.activation} leaves nothing to choose", fix)


def _eval_every_problems(written: Any) -> Iterator[Problem]:
    fix = "use 0 for never, null for at the end"
    try:
        length = Duration.parse(written)
    except ValueError as error:
        reason, _, forms = str(error).partition("; ")
        yield Problem("trainer.eval_every", reason, f"{forms}; {fix}" if forms else fix)
        return
    if length.value == 0 and written != 0:
        yield Problem("trainer.eval_every", f"'{written}' is no length", fix)


def _model_problems(model: Any) -> Iterator[Problem]:
    """Of the shapes that Llama-like models have; a model of the user's own is asked about those keys that it has too."""
    sizes = {key: model[key] for key in ("dim", "layers", "heads", "kv_heads", "ffn_dim", "vocabulary") if key in model}
    numbers = {key: size for key, size in sizes.items() if isinstance(size, int)}
    for key, size in numbers.items():
        if size < 1:
            yield Problem(f"model.{key}", f"{size} is not a size", "use 1 or more")
    for key in ("norm_eps", "rope_theta", "init_std", "mup_base"):
        value = model.get(key)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            yield Problem(f"model.{key}", f"{value} can't be", "use a number above 0")
    for key in ("mup_embedding", "mup_residual"):
        value = model.get(key)
        if isinstance(value, int | float) and not math.isfinite(value):
            yield Problem(f"model.{key}", f"{value} can't be", "use a finite number, 1 for none")
    if any(size < 1 for size in numbers.values()):
        return
    if "dim" in numbers and "heads" in numbers:
        dim, heads = numbers["dim"], numbers["heads"]
        if dim % heads:
            fits = _near_divisors(dim, heads)
            yield Problem("model.heads", f"{heads} heads don't divide model.dim={dim}", f"use {fits}")
        elif dim // heads % 2:
            yield Problem(
                "model.heads", f"a head width of {dim // heads} is odd, and positions rotate pairs", "change model.heads"
            )
    if "heads" in numbers and "kv_heads" in numbers and numbers["heads"] % numbers["kv_heads"]:
        heads, kv_heads = numbers["heads"], numbers["kv_heads"]
        fits = _near_divisors(heads, kv_heads)
        yield Problem("model.kv_heads", f"{kv_heads} key/value heads don't divide model.heads={heads}", f"use {fits}")


def _near_divisors(number: int, wanted: int) -> str:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = [*small, *(number // d for d in small)]
    below = max((d for d in divisors if d <= wanted), default=None)
    above = min((d for d in divisors if d >= wanted), default=None)
    return " or ".join(str(d) for d in (below, above) if d is not None)


def _launch_problems(launch: DictConfig) -> Iterator[Problem]:
    nproc = launch.nproc
    if nproc != "auto" and (not isinstance(nproc, int) or isinstance(nproc, bool) or nproc < 1):
        yield Problem("launch.nproc", f"{nproc!r} is not a number of processes", "use auto, or 1 or more")
    for key in ("nodes", "gpus_per_node"):
        if launch[key] < 1:
            yield Problem(f"launch.{key}", f"{launch[key]} is not a number of them", "use 1 or more")
    if launch.max_restarts < 0:
        yield Problem("launch.max_restarts", f"{launch.max_restarts} is negative", "use 0 for none")
    if launch.signal_seconds < 1:
        yield Problem("launch.signal_seconds", f"{launch.signal_seconds} leaves no time to save", "use for example 300")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", str(launch.time)):
        yield Problem("launch.time", f"'{launch.time}' is not a time limit", "write hours:minutes:seconds, or days-hours")
