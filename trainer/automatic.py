"""Values that a config leaves to a scaling law: `optim.lr=auto:step_law`, `batch.samples=auto:step_law`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config.nodes import Custom
from ..config.problems import Problem
from ..optim.optimizers.config import AUTOMATIC
from ..optim.scaling.laws import automatic_batch, automatic_lr
from .build import build_model
from .schema import RunConfig


def hidden_parameters(config: RunConfig) -> int:
    """Count the parameters of a run's model without embedding and head: the N of the step law."""
    model = build_model(config.model, vocabulary=1)
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("embed.", "head.")))


def resolve_automatic(config: RunConfig) -> list[Problem]:
    """Replace every automatic value in `config`, in place, by the law's number. Return the problems of laws that can't apply.

    The batch becomes a multiple of `batch.multiple`, where that is set.
    """
    problems: list[Problem] = []

    def apply_law(group: str, key: str, law: Callable[[str], Any]) -> None:
        node: Any = getattr(config, group)
        value = getattr(node, key)
        if not isinstance(value, str):
            return
        if config.trainer.tokens is None:
            fix = "give trainer.tokens (and trainer.steps=null)"
            problems.append(Problem(f"{group}.{key}", f"{value} needs the run's length in tokens", fix))
            return
        try:
            number = law(value.removeprefix(AUTOMATIC))
        except ValueError as error:
            message, _, fix = str(error).partition("; ")
            problems.append(Problem(f"{group}.{key}", message, fix))
            return
        setattr(node, key, number)
        if isinstance(node, Custom):
            node.keys[key] = number

    tokens, seq_len = config.trainer.tokens or 0, config.data.seq_len
    multiple = getattr(config.batch, "multiple", None) or 1
    apply_law("batch", "samples", lambda law: automatic_batch(law, tokens, seq_len, multiple))
    batch = config.batch.samples
    batch_tokens = batch * seq_len if isinstance(batch, int) else 0

    def lr(law: str) -> float:
        if law == "power" and config.schedule.name == "power":
            raise ValueError("schedule=power follows that law by itself, under optim.lr as a cap; set optim.lr to 0.02")
        if law == "power" and not batch_tokens:
            raise ValueError("auto:power needs the batch; set batch.samples")
        return float(f"{automatic_lr(law, hidden_parameters(config), tokens, batch_tokens):.4g}")

    apply_law("optim", "lr", lr)
    return problems
