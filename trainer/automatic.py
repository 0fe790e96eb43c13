"""Values that a config leaves to a scaling law: `optim.lr=auto:step_law`, `batch.samples=auto:step_law`."""

from __future__ import annotations

from collections.abc import Callable

from ..config.problems import Problem
from ..models.costs import hidden_parameter_count
from ..optim.optimizers.config import AUTOMATIC
from ..optim.scaling.laws import automatic_batch, automatic_lr
from .schema import RunConfig
from .typed import replace_keys, value_of


def hidden_parameters(config: RunConfig) -> int:
    """Count the parameters of a run's model without embedding and head: the N of the step law."""
    shape = config.model.decoder()
    if shape is not None:
        return hidden_parameter_count(shape)
    from .build import build_model  # only the user's class tells, which needs PyTorch

    model = build_model(config.model, vocabulary=1)
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("embed.", "head.")))


def resolve_automatic(config: RunConfig) -> tuple[RunConfig, list[Problem]]:
    """Return the config with the laws' numbers in place of automatic values, and the problems of laws that can't apply.

    The batch becomes a multiple of `batch.multiple`, where that is set. Imports PyTorch for a model of the user's own only.
    """
    problems: list[Problem] = []
    tokens, seq_len = config.trainer.tokens or 0, config.data.seq_len

    def decided(config: RunConfig, key: str, law: Callable[[str], int | float]) -> RunConfig:
        value = value_of(config, key)
        if not isinstance(value, str):
            return config
        if not tokens:
            fix = "give trainer.tokens (and trainer.steps=null)"
            problems.append(Problem(key, f"{value} needs the run's length in tokens", fix))
            return config
        try:
            return replace_keys(config, {key: law(value.removeprefix(AUTOMATIC))})
        except ValueError as error:
            message, _, fix = str(error).partition("; ")
            problems.append(Problem(key, message, fix))
            return config

    config = decided(config, "batch.samples", lambda law: automatic_batch(law, tokens, seq_len, config.batch.rounded_to or 1))
    samples = config.batch.samples
    batch_tokens = samples * seq_len if isinstance(samples, int) else 0

    def lr(law: str) -> float:
        if law == "power" and config.schedule.name == "power":
            raise ValueError("schedule=power follows that law by itself, under optim.lr as a cap; set optim.lr to 0.02")
        if law == "power" and not batch_tokens:
            raise ValueError("auto:power needs the batch; set batch.samples")
        return float(f"{automatic_lr(law, hidden_parameters(config), tokens, batch_tokens):.4g}")

    config = decided(config, "optim.lr", lr)
    return config, [*problems, *config.batch.problems(), *config.optim.problems()]
