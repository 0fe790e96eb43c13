"""Evaluate a checkpoint's model on tasks: every process holds the whole model, and requests are divided among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...config.per_host import after_first_on_host
from ...config.precision import PRECISIONS
from ...parallel.layout import Layout
from ...parallel.mesh import Mesh, pick_device
from ..all_ranks import raise_on_all_ranks
from ..build import build_model
from ..checkpoint_tokenizer import checkpoint_tokenizer
from ..find_checkpoint import checkpoint_manifest, tokenizer_beside
from ..resolve import ResolvedRun
from ..resumed_config import saved_config
from ..tokenizer_settings import beginning_token, settings_folder
from ..whole_model import load_whole_model
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
        return {**{name: value for name, value in vars(self).items() if name != "values"}, "tasks": tasks}


def evaluate_tasks(resolved: ResolvedRun, context: int) -> TasksResult:
    """Evaluate the model of `resolved.checkpoint` on the tasks of its config, as one of the processes. The same on all of them.

    context: tokens that the model reads at most

    Raises ConfigError for tasks that can't be loaded or a checkpoint without a tokenizer, CheckpointError for a damaged one.
    """
    from .language_model import LanguageModel  # lm-eval is imported here, and not where nothing is evaluated

    config, checkpoint = resolved.config, resolved.checkpoint
    assert checkpoint is not None, "the command names one"
    manifest = checkpoint_manifest(checkpoint)
    saved = saved_config(manifest.state)
    tokenizer, beside = checkpoint_tokenizer(checkpoint, saved, manifest.state), tokenizer_beside(checkpoint)
    settings = settings_folder(saved.get("data", {}).get("tokenizer")) if beside is None else beside.parent
    mesh = Mesh.connect(Layout.plan(config.parallel, resolved.world_size), pick_device(), config.parallel.timeout)
    log_quietly(mesh.is_main)
    try:
        tasks = raise_on_all_ranks(mesh, lambda: after_first_on_host("tasks", lambda: Tasks.load(config.tasks)))
        if mesh.differ(f"{checkpoint} {tokenizer.fingerprint}"):
            raise RuntimeError("processes see different checkpoints: give all of them the same files")
        model = build_model(config.model, config.model.vocabulary or manifest.state.get("vocabulary") or tokenizer.vocabulary)
        dtype: torch.dtype = getattr(torch, PRECISIONS[config.precision].dtype)
        prefix = beginning_token(tokenizer, settings)
        raise_on_all_ranks(mesh, lambda: tasks.check(LanguageModel(model, tokenizer, context, mesh, prefix)))
        whole = raise_on_all_ranks(mesh, lambda: load_whole_model(model, checkpoint, mesh.device, dtype))
        values = tasks.evaluate(LanguageModel(whole, tokenizer, context, mesh, prefix), mesh, errors=True)
        return TasksResult(str(checkpoint), manifest.step, mesh.layout.world_size, config.precision, context, tuple(values))
    finally:
        mesh.close()
