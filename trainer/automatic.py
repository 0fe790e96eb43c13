"""Values that a config leaves to a law of scale: `optim.lr=auto:step_law`, `batch.samples=auto:step_law`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from ..config.problems import Problem
from ..optim.scaling.laws import automatic_batch, automatic_lr
from .build import build_model

PREFIX = "auto:"


def hidden_parameters(model_config: DictConfig) -> int:
    """Parameters of a run's model without its embedding and its head: the N of the step law."""
    model = build_model(model_config, vocabulary=1)
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("embed.", "head.")))


def resolve_automatic(config: DictConfig, data_size: int) -> list[Problem]:
    """Replace every automatic value in `config`, in place, by the law's number. Returns what keeps a law from being asked.

    data_size: data-parallel size; the batch becomes a multiple of batch.micro times it.
    """
    problems: list[Problem] = []

    def asked(group: str, key: str, law: Callable[[str], Any]) -> None:
        value = config[group].get(key)
        if not isinstance(value, str):
            return
        if not value.startswith(PREFIX):
            problems.append(Problem(f"{group}.{key}", f"'{value}' is not a number", f"write one, or {PREFIX}step_law"))
            return
        if config.trainer.tokens is None:
            fix = "give trainer.tokens (and trainer.steps=null)"
            problems.append(Problem(f"{group}.{key}", f"{value} needs the run's length in tokens", fix))
            return
        try:
            config[group][key] = law(value.removeprefix(PREFIX))
        except ValueError as error:
            message, _, fix = str(error).partition("; ")
            problems.append(Problem(f"{group}.{key}", message, fix))

    tokens, seq_len = config.trainer.tokens, config.data.seq_len
    asked("batch", "samples", lambda law: automatic_batch(law, tokens, seq_len, config.batch.micro * data_size))
    batch = config.batch.get("samples")
    batch_tokens = batch * seq_len if isinstance(batch, int) else 0

    def lr(law: str) -> float:
        if law == "power" and config.schedule.get("name") == "power":
            raise ValueError("schedule=power follows that law by itself, under optim.lr as a cap; set optim.lr to 0.02")
        if law == "power" and not batch_tokens:
            raise ValueError("auto:power needs the batch; set batch.samples")
        return float(f"{automatic_lr(law, hidden_parameters(config), tokens, batch_tokens):.4g}")

    asked("optim", "lr", lr)
    return problems
