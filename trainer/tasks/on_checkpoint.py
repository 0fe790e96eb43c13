"""Evaluate a checkpoint's model on tasks: every process holds the whole model, and requests are divided among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...config.precision import PRECISIONS
from ...parallel.layout import Layout
from ...parallel.mesh import Mesh, pick_device
from ..all_ranks import raise_on_all_ranks
from ..build import build_model
from ..checkpoint_tokenizer import checkpoint_tokenizer
from ..find_checkpoint import checkpoint_manifest, tokenizer_beside
from ..resolve import ResolvedRun
from ..resumed_config import saved_config
from ..whole_model import load_whole_model
from .beginning import beginning_token
from .evaluation import Tasks, TaskValue, log_quietly


@dataclass(frozen=True)
class TasksResult:
    """Values of a checkpoint's model on tasks. processes: among which the requests were divided."""

    checkpoint: str
    step: int
    processes: int
    precision: str
    context: int
    values: tuple[TaskValue, ...]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values, the metrics by task."""
        tasks: dict[str, list[dict[str, Any]]] = {}
        for value in self.values:
            tasks.setdefault(value.task, []).append(value.as_json())
        return {**{name: told for name, told in vars(self).items() if name != "values"}, "tasks": tasks}


def evaluate_tasks(resolved: ResolvedRun, context: int) -> TasksResult:
    """Evaluate the model of `resolved.checkpoint` on the tasks of its config, as one of the processes. The same on all of them.

    context: tokens that the model reads at most

    Raises ConfigError for tasks that can't be loaded or a checkpoint without a tokenizer, CheckpointError for a damaged one.
    """
    from .language_model import LanguageModel  # lm-eval is imported here, and not where nothing is evaluated

    config, checkpoint = resolved.config, resolved.checkpoint
    assert checkpoint is not None, "the command names one"
    manifest = checkpoint_manifest(checkpoint)
    tokenizer = checkpoint_tokenizer(checkpoint, saved_config(manifest.state), manifest.state)
    mesh = Mesh.connect(Layout.plan(config.parallel, resolved.world_size), pick_device(), config.parallel.timeout)
    log_quietly(mesh.is_main)
    try:
        tasks = raise_on_all_ranks(mesh, lambda: Tasks.load(config.tasks))
        if mesh.differ(f"{checkpoint} {tokenizer.fingerprint}"):
            raise RuntimeError("processes see different checkpoints: give all of them the same files")
        model = build_model(config.model, config.model.vocabulary or manifest.state.get("vocabulary") or tokenizer.vocabulary)
        dtype: torch.dtype = getattr(torch, PRECISIONS[config.precision].dtype)
        whole = raise_on_all_ranks(mesh, lambda: load_whole_model(model, checkpoint, mesh.device, dtype))
        begins = beginning_token(tokenizer, str(tokenizer_beside(checkpoint) or ""))
        values = tasks.evaluate(LanguageModel(whole, tokenizer, context, mesh, begins))
        return TasksResult(str(checkpoint), manifest.step, mesh.layout.world_size, config.precision, context, tuple(values))
    finally:
        mesh.close()
