"""Values derived from a config by arithmetic. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..config.duration import Duration, Unit
from ..optim.horizon import Horizon
from ..optim.progress import BEGINNING, Progress
from ..parallel.policies import ActivationSettings
from .config import TrainerConfig
from .schema import RunConfig
from .stages.record import Place

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run_length(trainer: TrainerConfig) -> Duration:
    """Return the horizon that `trainer.steps` or `trainer.tokens` sets."""
    if trainer.steps is not None:
        return Duration(trainer.steps, Unit.STEPS)
    assert trainer.tokens is not None
    return Duration(trainer.tokens, Unit.TOKENS)


def build_horizon(
    config: RunConfig, seq_len: int, begun: Progress = BEGINNING, place: Place | None = None, group: str = "schedule"
) -> Horizon:
    """Return the length of the run and what its steps are worth in tokens.

    begun: the progress of the checkpoint that it resumes from
    place: of a run with stages. The horizon is then that of a group's current values: see `Place.length`
    """
    fixed = config.batch.start if config.batch.name == "fixed" else None
    if fixed is not None and begun.history.points:
        begun = begun.before(fixed, seq_len)
    if place is not None:
        return Horizon(place.length(group), seq_len, fixed, begun, place.origin(group))
    return Horizon(run_length(config.trainer), seq_len, fixed, begun)


def activation_settings(config: RunConfig) -> ActivationSettings:
    """Return what a config says of the activations that blocks keep."""
    trainer = config.trainer
    return ActivationSettings(trainer.activation, trainer.activation_budget, config.precision, trainer.compile)


def checkpoint_folder(config: RunConfig | DictConfig) -> str:
    """Return where the run's checkpoints are: a path or an fsspec URL. config: resolved, or as composed"""
    return str(config.checkpoint.folder or Path(config.output_dir) / "checkpoints")
