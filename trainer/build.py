"""Build a run from its config: every object of `Loop`, in the order in which they need one another."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.control import Control
from ..checkpoint.errors import HeldError
from ..config.nodes import Custom
from ..config.problems import ConfigError, Problem
from ..data.assignment import Dealer
from ..data.batch import Samples
from ..data.loader import Loader
from ..data.node import DataNode
from ..data.reading import read_on, shifted
from ..data.samples.left_out import LeftOut
from ..data.validation import ValidationPart
from ..data.version import rules_version
from ..models import build as models
from ..models.config import ModelConfig
from ..models.protocol import Model
from ..models.user_module import defaults_used
from ..optim.build import build_controller, build_optimizer, build_schedule
from ..optim.optimizers.config import OptimConfig
from ..optim.optimizers.parameters import NamedParameter, Shards
from ..optim.progress import Progress
from ..optim.schedules.coupling import Coupling
from ..parallel.division import divide_blocks
from ..parallel.engine import EngineSettings, OptimizerFactory
from ..parallel.engines import make_engine
from ..parallel.hybrid.cost import decoder_flops, module_flops
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh
from .all_ranks import raise_on_all_ranks
from .costs import assigner_of
from .derived import activation_settings, build_horizon, checkpoint_folder
from .guard.guard import StepGuard
from .guard.island_statistics import IslandStatistics
from .guard.journal import Journal
from .hooks.build import HookParts, build_hooks
from .hooks.saving import Saving
from .hybrid import hidden_copies, hybrid_dealer
from .loop import Loop
from .schema import RunConfig
from .stages.record import Place, StageRecord

log = logging.getLogger(__name__)


def build_model(config: ModelConfig, vocabulary: int) -> Model:
    """Build the model, with its parameters on the meta device.

    vocabulary: of the data, for a config that leaves the model's open
    """
    if isinstance(config, Custom):
        return models.build_model({"_target_": config.path, **config.keys}, vocabulary)
    return models.build_model(dataclasses.asdict(config), vocabulary)


def build_control(mesh: Mesh, name: str, place: Place | None = None) -> Control:
    """Build the control channel of saves or restores: a store client of its own, whose keys no restart and no stage shares.

    The processes' store is new at each start. Its name must not hold torchrun's count of restarts, on which nodes differ.
    """
    stage = "" if place is None else f"-{place.number}"
    return Control(mesh.rank, mesh.layout.world_size, mesh.store(f"{name}{stage}"))


def optimizer_factory(config: OptimConfig) -> OptimizerFactory:
    """Return the function with which an engine builds the optimizer of `config` over its parameters."""

    def make(parameters: Sequence[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
        return build_optimizer(config, parameters, shards)

    return make


def engine_settings(config: RunConfig, model: Model, seq_len: int = 0, measures: bool = False) -> EngineSettings:
    """Return the settings that engines read from a config, with the division of the model's blocks.

    seq_len: positions per sample; measures: whether the batch-size controller needs gradient statistics.
    Raises ValueError for an activation budget that no choice of policies keeps to.
    """
    trainer, blocks = config.trainer, len(model.block_modules())
    policies, stages = divide_blocks(model.decoder_config, blocks, config.parallel, activation_settings(config), seq_len)
    return EngineSettings(
        seed=config.seed,
        precision=config.precision,
        policies=policies,
        stages=stages,
        compile=trainer.compile,
        float8=trainer.float8,
        seq_len=seq_len,
        measures=measures,
        balance=config.balance,
        local=config.optim.local,
        masters=config.trainer.masters,
    )


def build_dealer(config: RunConfig, layout: Layout, model: Model, island: int = 0) -> Dealer:
    """Build what deals global batches to the data ranks: their samples, or under hybrid data parallelism their documents."""
    if config.parallel.hdp == "none":
        return assigner_of(config, layout, layout.islands, island)
    seq_len, shape = config.data.seq_len, model.decoder_config
    flops = module_flops(model.flops_per_token, seq_len) if shape is None else decoder_flops(shape)
    return hybrid_dealer(config, layout, shape, flops)


@dataclass
class Run:
    """A loop, with the resources that must be closed and the saves that must be finished.

    place  the stage that it trains, of a run that has some
    """

    loop: Loop
    saving: Saving | None
    loader: Loader
    data: DataNode
    place: Place | None = None

    def close(self) -> None:
        """Release threads, files and connections. An exception from one does not keep the others open."""
        with contextlib.ExitStack() as all_of_them:
            all_of_them.callback(self.loader.close)
            for hook in reversed(self.loop.hooks):
                all_of_them.callback(hook.close)


def build_run(
    config: RunConfig,
    saved: Mapping[str, Any],
    data: DataNode,
    mesh: Mesh,
    place: Place | None = None,
    sets: Sequence[ValidationPart] = (),
    settings: Path | None = None,
) -> Run:
    """Build a run on prepared data, with fresh weights. `resume.py` then loads a checkpoint's state into it.

    saved: what its checkpoints state about it: the config, and the options that were chosen
    place: the stage that it trains, of a run that has some; sets: its named validation sets
    settings: the folder with the settings of the data's tokenizer

    Raises ConfigError, before any memory is taken, where another run saves into the checkpoint folder.
    """
    # Rank 0 locks the checkpoint folder: it may lie outside `output_dir`, whose lock the run already has.
    checkpointer = raise_on_all_ranks(mesh, lambda: open_checkpointer(config, mesh, place))
    try:
        return _build(config, saved, data, mesh, checkpointer, place, sets, settings)
    except BaseException:
        if checkpointer is not None:
            checkpointer.close()
        raise


def open_checkpointer(config: RunConfig, mesh: Mesh, place: Place | None = None) -> Checkpointer | None:
    """Open the checkpointer of a run; None with checkpoint.every=0.

    Raises ConfigError if another run saves into the folder, or it can't be written to.
    """
    settings = config.checkpoint
    if settings.every == 0:
        return None
    try:
        return Checkpointer(checkpoint_folder(config), build_control(mesh, "save", place), settings)
    except HeldError as error:
        raise ConfigError([Problem("checkpoint.folder", str(error))]) from error
    except OSError as error:
        message = f"'{checkpoint_folder(config)}' can't be written to: {error.strerror or error}"
        raise ConfigError([Problem("checkpoint.folder", message, "give a folder to write to")]) from error


def _build(
    config: RunConfig,
    saved: Mapping[str, Any],
    data: DataNode,
    mesh: Mesh,
    checkpointer: Checkpointer | None,
    place: Place | None,
    sets: Sequence[ValidationPart],
    tokenizer_settings: Path | None,
) -> Run:
    output_dir = Path(config.output_dir)
    vocabulary = config.model.vocabulary or data.vocabulary
    model = build_model(config.model, vocabulary)
    if mesh.is_main:
        for default in defaults_used(model):
            log.info("%s has no %s", type(model).__name__, default)
    flops = model.flops_per_token(data.seq_len)
    horizon = build_horizon(config, data.seq_len)
    controller = build_controller(config.batch, build_horizon(config, data.seq_len, place=place, group="batch"))
    schedule_horizon = build_horizon(config, data.seq_len, place=place, group="schedule")
    settings = engine_settings(config, model, data.seq_len, controller.needs_statistics)
    settings = replace(settings, hidden_copies=hidden_copies(config, mesh.layout, model.decoder_config))
    engine = make_engine(model, mesh.island, optimizer_factory(config.optim), config.parallel, settings)
    dealer = build_dealer(config, mesh.layout, model, mesh.island_number)
    journal = Journal(data.fingerprint)
    samples = LeftOut(training_samples(data, place), journal.is_left_out)
    loader = Loader(samples, dealer, mesh.data_rank, pin=mesh.device.type == "cuda")

    saving = None
    if checkpointer is not None:
        fixed = {**saved, **_stated(data, mesh, vocabulary)}
        saving = Saving(checkpointer, config.checkpoint.every, fixed, functools.partial(_stages_state, place, data))
    build = functools.partial(build_model, config.model, vocabulary)
    shape = model.decoder_config
    parts = HookParts(config, mesh, data, dealer, engine, shape, build, settings.compute, tokenizer_settings)
    guard = StepGuard(mesh.island, config.trainer, journal, checkpoint_folder(config), output_dir)
    local = config.optim.local
    loop = Loop(
        mesh=mesh,
        engine=engine,
        batches=loader,
        controller=controller,
        schedule=build_schedule(config.schedule, config.optim.lr, schedule_horizon),
        coupling=Coupling(config.optim.lr_coupling),
        horizon=horizon,
        flops_per_token=flops,
        output_dir=output_dir,
        max_grad_norm=config.trainer.max_grad_norm,
        hooks=build_hooks(parts, sets, saving),
        guard=guard,
        island_statistics=IslandStatistics(mesh, guard, local.islands) if local.active else None,
        stage=None if place is None else place.stage,
    )
    return Run(loop, saving, loader, data, place)


def _stated(data: DataNode, mesh: Mesh, vocabulary: int) -> dict[str, Any]:
    """Return what checkpoints state of a run's data and layout."""
    tokenizer = data.tokenizer
    return {
        "data_fingerprint": data.fingerprint,
        "data_version": rules_version(data),
        "vocabulary": vocabulary,
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "end_of_document": None if tokenizer is None else tokenizer.end_of_document,
        "layout": mesh.layout.describe(),
        "islands": mesh.layout.islands,
    }


def training_samples(data: DataNode, place: Place | None) -> Samples:
    """Return the training samples under the run's numbers; in a stage with data of its own, those not read before."""
    if place is None or place.record is None:
        return data.train()
    return shifted(read_on(data, place.record.read_before), -place.origin("data").samples)


def _stages_state(place: Place | None, data: DataNode, progress: Progress) -> dict[str, Any]:
    """Return what a checkpoint states of the run's stages, and of the samples read: stages may be given to a run later."""
    if place is None or place.record is None:
        return {"stages": StageRecord().after(data, progress.samples).as_json()}
    return {"stages": place.record.after(data, progress.samples - place.origin("data").samples).as_json()}
