"""From a config to a run: every object of `Loop`, built in the order in which they need one another."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.config import CheckpointConfig
from ..checkpoint.control import Control
from ..checkpoint.errors import CheckpointError, HeldError
from ..checkpoint.files import open_files
from ..config.duration import Duration, Unit
from ..config.problems import ConfigError, Problem
from ..data.assignment import Assigner, load_share
from ..data.batch import GlobalBatch
from ..data.loader import Loader
from ..data.node import DataNode
from ..models import build as models
from ..models.protocol import Model
from ..models.user_module import defaults_used
from ..optim.build import build_controller, build_optimizer, build_schedule, compares_halves
from ..optim.horizon import Horizon
from ..optim.optimizers.parameters import NamedParameter, Shards
from ..optim.schedules.coupling import Coupling
from ..parallel.config import ParallelConfig
from ..parallel.engine import EngineSettings, OptimizerFactory
from ..parallel.engines import make_engine
from ..parallel.layout import Layout
from ..parallel.legality import micro_batch_unit
from ..parallel.mesh import Mesh
from ..parallel.pipeline.stages import legal_micro_batches
from .all_ranks import together
from .config import TrainerConfig
from .hooks.base import Hook
from .hooks.evaluation import Evaluation
from .hooks.garbage import CollectGarbage
from .hooks.loggers.config import LoggingConfig
from .hooks.loggers.defaults import default_loggers
from .hooks.profiling import ProfileStep
from .hooks.sampling import SampleText, TextCodec
from .hooks.saving import Saving
from .loop import Loop

log = logging.getLogger(__name__)

UNTOLD_VOCABULARY = 32_000  # of synthetic data where the model leaves it to the data as well


@dataclass(frozen=True)
class Parts:
    """The typed groups of a config; the others are built by their `_target_`."""

    trainer: TrainerConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig

    @classmethod
    def of(cls, config: DictConfig) -> Parts:
        """Read them off the whole config."""
        return cls(**{name: cast(Any, OmegaConf.to_object(config[name])) for name in cls.__dataclass_fields__})


def build_data(config: DictConfig) -> DataNode:
    """The data of `config.data`; a synthetic one takes the model's vocabulary where it has none of its own."""
    node = {key: value for key, value in cast(Any, OmegaConf.to_container(config.data, resolve=True)).items() if key != "name"}
    if node.get("vocabulary", 0) is None:
        node["vocabulary"] = config.model.get("vocabulary") or UNTOLD_VOCABULARY
    return instantiate({**node, "_convert_": "all"}, seed=config.seed)


def build_model(config: DictConfig, vocabulary: int) -> Model:
    """The model, its parameters on the meta device. Its vocabulary is the data's where the config leaves it open."""
    return models.build_model(cast(Any, OmegaConf.to_container(config.model, resolve=True)), vocabulary)


def run_length(trainer: TrainerConfig) -> Duration:
    """The horizon that `trainer.steps` or `trainer.tokens` sets."""
    if trainer.steps is not None:
        return Duration(trainer.steps, Unit.STEPS)
    assert trainer.tokens is not None
    return Duration(trainer.tokens, Unit.TOKENS)


def build_horizon(config: DictConfig, seq_len: int) -> Horizon:
    """Length of the run and what its steps are worth in tokens."""
    fixed = config.batch.samples if config.batch.name == "fixed" else None
    return Horizon(run_length(Parts.of(config).trainer), seq_len, fixed)


def checkpoint_folder(config: DictConfig) -> str:
    """Where the run's checkpoints are: a path or an fsspec URL. Raises ConfigError for a URL that nothing here can read."""
    folder = str(config.checkpoint.folder or Path(config.output_dir) / "checkpoints")
    try:
        open_files(folder)
    except CheckpointError as error:
        fix = "give a path, or a URL whose fsspec library is installed"
        raise ConfigError([Problem("checkpoint.folder", str(error), fix)]) from error
    return folder


def build_control(mesh: Mesh, name: str) -> Control:
    """Who saves and restores together: a client of the run's store of its own, under names that a restart does not share."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Control(mesh.rank, mesh.layout.world_size, mesh.store(f"{name}-{restart}"))


def optimizer_factory(config: DictConfig) -> OptimizerFactory:
    """Builds the optimizer of `config.optim` over the parameters that an engine has."""

    def make(parameters: Sequence[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
        return build_optimizer(config.optim, parameters, shards)

    return make


def engine_settings(config: DictConfig, seq_len: int = 0, measures: bool = False) -> EngineSettings:
    """What engines read of a config.

    seq_len: positions per sample; measures: whether the batch-size controller wants gradient statistics.
    """
    trainer = Parts.of(config).trainer
    return EngineSettings(
        seed=config.seed,
        precision=config.precision,
        activation=trainer.activation,
        activation_budget=trainer.activation_budget,
        compile=trainer.compile,
        float8=trainer.float8,
        seq_len=seq_len,
        measures=measures,
    )


def batch_divisor(config: DictConfig, data_size: int) -> int:
    """What the layout asks every global batch to be a multiple of: whole micro-batches for every data-parallel process."""
    unit = 1 if config.batch.name == "fixed" else micro_batch_unit(Parts.of(config).parallel)  # a pipeline can't run any number
    return data_size * config.batch.micro * unit


def build_assigner(config: DictConfig, layout: Layout) -> Assigner:
    """How the run's global batches are dealt to its data ranks."""
    can_run = functools.partial(legal_micro_batches, Parts.of(config).parallel)
    return Assigner(layout.data_size, can_run, compares_halves(config.optim))


def build_coupling(config: DictConfig) -> Coupling:
    """How the learning rate follows the batch; `optim.lr` is meant for the batch that the run starts with."""
    return Coupling(config.optim.get("lr_coupling", "none"))


@dataclass
class Run:
    """A loop, and what has to be closed or finished around it."""

    loop: Loop
    saving: Saving | None
    loader: Loader
    data: DataNode

    def close(self) -> None:
        """Release threads, files and connections: all of them, whatever one has to say."""
        with contextlib.ExitStack() as all_of_them:
            all_of_them.callback(self.loader.close)
            for hook in reversed(self.loop.hooks):
                all_of_them.callback(hook.close)


def build_run(config: DictConfig, data: DataNode, mesh: Mesh) -> Run:
    """Everything of a run on prepared data, with fresh weights; `resume.py` then puts a checkpoint's state into it.

    Raises ConfigError, before any memory is taken, where another run saves into the folder of checkpoints.
    """
    # One process takes the folder's lock: that of `output_dir`, which the run has, does not hold where it is elsewhere.
    checkpointer = together(mesh, lambda: open_checkpointer(config, mesh))
    try:
        return _built(config, data, mesh, checkpointer)
    except BaseException:
        if checkpointer is not None:
            checkpointer.close()
        raise


def open_checkpointer(config: DictConfig, mesh: Mesh) -> Checkpointer | None:
    """What saves the run; None for one that saves nothing. Raises ConfigError where another run saves into the folder, or
    nobody can.
    """
    settings = Parts.of(config).checkpoint
    if settings.every == 0:
        return None
    try:
        return Checkpointer(checkpoint_folder(config), build_control(mesh, "save"), settings)
    except HeldError as error:
        raise ConfigError([Problem("checkpoint.folder", str(error))]) from error
    except OSError as error:
        message = f"'{checkpoint_folder(config)}' can't be written to: {error.strerror or error}"
        raise ConfigError([Problem("checkpoint.folder", message, "give a folder to write to")]) from error


def _built(config: DictConfig, data: DataNode, mesh: Mesh, checkpointer: Checkpointer | None) -> Run:
    parts = Parts.of(config)
    output_dir = Path(config.output_dir)
    vocabulary = config.model.get("vocabulary") or data.vocabulary
    model = build_model(config, vocabulary)
    if mesh.is_main:
        for default in defaults_used(model):
            log.info("%s has no %s", type(model).__name__, default)
    flops = model.flops_per_token(data.seq_len)
    horizon = build_horizon(config, data.seq_len)
    controller = build_controller(config.batch, horizon, batch_divisor(config, mesh.layout.data_size))
    settings = engine_settings(config, data.seq_len, controller.needs_statistics)
    engine = make_engine(model, mesh, optimizer_factory(config), parts.parallel, settings)
    assigner = build_assigner(config, mesh.layout)
    loader = Loader(data.train(), assigner, mesh.data_rank, pin=mesh.device.type == "cuda")

    hooks: list[Hook] = []
    if mesh.is_main and parts.trainer.profile_step is not None:  # first: what the others do at a step's end is not the step's
        hooks.append(ProfileStep(parts.trainer.profile_step, output_dir / "profile"))
    hooks += [CollectGarbage(), *(cast(Hook, instantiate(node)) for node in parts.trainer.hooks)]
    validation = data.validation()
    if validation is not None and parts.trainer.eval_every != 0:
        count = min(parts.trainer.eval_samples, len(validation))
        held_out = Assigner(assigner.data_size).assign(GlobalBatch(0, count), config.batch.micro)
        every = parts.trainer.eval_every
        batches = load_share(validation, held_out, mesh.data_rank).micro_batches
        hooks.append(Evaluation(batches, None if every is None else Duration.parse(every)))
    elif validation is None and parts.trainer.eval_every and mesh.is_main:
        log.warning("trainer.eval_every: there will be no evaluation, because the data keeps nothing for validation")
    saving = None
    if checkpointer is not None:
        fixed = {
            "config": OmegaConf.to_container(config, resolve=False),
            "data_fingerprint": data.fingerprint,
            "vocabulary": vocabulary,
            "tokenizer": data.tokenizer.fingerprint if data.tokenizer is not None else None,
            "layout": mesh.layout.describe(),
        }
        saving = Saving(checkpointer, parts.checkpoint.every, fixed)
        hooks.append(saving)
    if mesh.is_main:
        if parts.trainer.sample_prompt is not None:
            build = functools.partial(build_model, config, vocabulary)
            hooks += _sample(config, parts.trainer, build, data.tokenizer, saved=saving is not None)
        hooks += default_loggers(parts.logging, output_dir, config)

    loop = Loop(
        mesh=mesh,
        engine=engine,
        batches=loader,
        controller=controller,
        schedule=build_schedule(config.schedule, config.optim.lr, horizon),
        coupling=build_coupling(config),
        horizon=horizon,
        micro=config.batch.micro,
        flops_per_token=flops,
        output_dir=output_dir,
        max_grad_norm=parts.trainer.max_grad_norm,
        hooks=hooks,
    )
    return Run(loop, saving, loader, data)


def _sample(
    config: DictConfig, trainer: TrainerConfig, build: Callable[[], Model], codec: TextCodec | None, *, saved: bool
) -> list[Hook]:
    """The hook that shows a sample at the end of the run, where it can."""
    assert trainer.sample_prompt is not None
    if codec is None or not saved:  # checkpoints of an earlier run may lie there
        why = "the data has no text" if codec is None else "the run saves nothing (checkpoint.every=0)"
        log.warning("trainer.sample_prompt: there will be no sample, because %s", why)
        return []
    return [SampleText(trainer.sample_prompt, trainer.sample_tokens, build, codec, config.seed, checkpoint_folder(config))]
