"""Build the hooks of a run, in the order in which the loop calls them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ...config.duration import Duration
from ...config.problems import ConfigError, Problem
from ...data.assignment import Dealer
from ...data.batch import GlobalBatch
from ...data.node import DataNode
from ...data.validation import ValidationPart, samples_of_parts, validation_parts
from ...models.config import DecoderConfig
from ...models.protocol import Model
from ...parallel.engine import Engine
from ...parallel.mesh import Mesh
from ..derived import checkpoint_folder
from ..schema import RunConfig
from ..tokenizer_settings import beginning_token
from ..typed import plain_config
from ..validation_samples import evaluation_dealer, validation_share
from .base import Hook
from .evaluation import Evaluation, EvaluationSet
from .expert_load import WarnOfCollapse
from .expert_map import ExpertMap
from .garbage import CollectGarbage
from .hybrid_waiting import MeasureWaiting
from .island_history import IslandHistory
from .loggers.defaults import default_loggers
from .profiling import ProfileStep
from .rebuilt_history import RebuiltHistory
from .replicas import CompareReplicas
from .sampling import SampleText
from .saving import Saving
from .stragglers import NameStragglers
from .tasks import TaskEvaluation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HookParts:
    """The parts of a run that its hooks are built from.

    dealer  of the run's global batches
    shape   of a decoder; None: another model
    build   makes the model on the meta device
    dtype   in which the model computes
    tokenizer_settings  the folder with the settings of the data's tokenizer
    """

    config: RunConfig
    mesh: Mesh
    data: DataNode
    dealer: Dealer
    engine: Engine
    shape: DecoderConfig | None
    build: Callable[[], Model]
    dtype: torch.dtype
    tokenizer_settings: Path | None

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)

    @property
    def mixtures(self) -> list[int]:
        """The layers with a mixture of experts."""
        return [] if self.shape is None else self.shape.mixture_layers()


def build_hooks(run: HookParts, sets: Sequence[ValidationPart], saving: Saving | None) -> list[Hook]:
    """Build the hooks of this rank. Those of all ranks come first, and those of rank 0, which never communicate, last.

    sets: the named validation sets; saving: the hook that saves; None: nothing is saved
    """
    trainer, checkpoint = run.config.trainer, run.config.checkpoint
    hooks: list[Hook] = []
    if run.mesh.is_main and trainer.profile_step is not None:  # first: what the others do at a step's end is not the step's
        hooks.append(ProfileStep(trainer.profile_step, run.output_dir / "profile"))
    hooks += [CollectGarbage(), *(build_hook(node) for node in trainer.hooks)]
    # Before the hooks that compare and save: it reads the step's numbers. A save that comes after need not be held for them,
    # and where they tell that the run shall stop, copies are compared before its last save.
    hooks += _evaluations(run, sets)
    # Before the hook that saves, which confirms what this one has found in order.
    if trainer.compare_replicas_every is not None:
        saves = checkpoint.every, checkpoint.memory_every
        hooks.append(CompareReplicas(trainer.compare_replicas_every, saves, trainer.on_bad_step))
    if saving is not None:
        hooks.append(saving)
    # Behind the hook that saves: a step that is due for both is saved first, since tasks take long, and may fail.
    if run.config.tasks.names:
        hooks.append(_task_evaluation(run))
    if run.mesh.is_main:
        hooks += _of_main(run, saved=saving is not None)
    return hooks


def _of_main(run: HookParts, *, saved: bool) -> Iterator[Hook]:
    """Yield the hooks of rank 0, which watch, and the loggers behind them, to which they may show something."""
    yield RebuiltHistory()
    if run.engine.islands is not None:
        yield IslandHistory()
    if run.mesh.layout.world_size > 1:
        yield NameStragglers()
    if MeasureWaiting.can_measure(run.dealer):
        yield MeasureWaiting()
    if run.config.trainer.sample_prompt is not None:
        yield from _samples(run, run.config.trainer.sample_prompt, saved=saved)
    if run.shape is not None and (mixtures := run.mixtures):
        yield WarnOfCollapse(run.shape.experts)
        yield ExpertMap(mixtures, run.output_dir / "experts")
    yield from default_loggers(run.config.logging, run.output_dir, plain_config(run.config))


def build_hook(node: Mapping[str, Any]) -> Hook:
    """Build a user's hook from its config node. Raises ConfigError if its constructor fails."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return cast(Hook, instantiate(dict(node)))
    except InstantiationException as error:
        reason = error.__cause__ or error
        message = f"{node['_target_']} can't be built: {type(reason).__name__}: {reason}"
        raise ConfigError([Problem("trainer.hooks", message, "check its keys, and what its constructor needs")]) from error


def _evaluations(run: HookParts, sets: Sequence[ValidationPart]) -> Iterator[Hook]:
    """Yield the hook that evaluates on the data's validation samples and the named sets, if there are any."""
    every = run.config.trainer.eval_every
    if every == 0:
        return
    parts = [*validation_parts(run.data), *sets]
    if parts:
        dealer = evaluation_dealer(run.config, run.mesh.layout, run.dealer)
        yield build_evaluation(run.config, parts, run.mesh, dealer, run.mixtures)
    elif every and run.mesh.is_main:
        log.warning("trainer.eval_every: there will be no evaluation, because the data keeps nothing for validation")


def build_evaluation(
    config: RunConfig, parts: Sequence[ValidationPart], mesh: Mesh, dealer: Dealer, mixtures: Sequence[int]
) -> Evaluation:
    """Build the hook that evaluates on the parts' validation samples. mixtures: the layers with experts."""
    counts = samples_of_parts(parts, config.trainer.eval_samples)
    sets = [
        EvaluationSet(part.name, part.weight, validation_share(config, mesh, dealer, part, GlobalBatch(0, count)).micro_batches)
        for part, count in zip(parts, counts, strict=True)
    ]
    every = config.trainer.eval_every
    return Evaluation(sets, None if every is None else Duration.parse(every), mixtures)


def _task_evaluation(run: HookParts) -> TaskEvaluation:
    """Build the hook that evaluates on tasks. Raises ConfigError for data without text."""
    tokenizer = run.data.tokenizer
    if tokenizer is None:
        fix = "train on text, or on shards with their tokenizer; or leave the tasks out (tasks.names=[])"
        raise ConfigError([Problem("tasks.names", "tasks are text, and the data has no tokenizer", fix)])
    prefix = beginning_token(tokenizer, run.tokenizer_settings)
    return TaskEvaluation(run.config.tasks, run.build, tokenizer, run.dtype, prefix)


def _samples(run: HookParts, prompt: str, *, saved: bool) -> Iterator[Hook]:
    """Yield the hook that samples text at the end of the run; none where there is no tokenizer or no checkpoint."""
    codec, config = run.data.tokenizer, run.config
    if codec is None or not saved:  # checkpoints of an earlier run may lie there
        why = "the data has no text" if codec is None else "the run saves nothing (checkpoint.every=0)"
        log.warning("trainer.sample_prompt: there will be no sample, because %s", why)
        return
    folder = checkpoint_folder(config)
    yield SampleText(prompt, config.trainer.sample_tokens, run.build, codec, config.seed, folder, run.dtype)
