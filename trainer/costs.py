"""Cost a config: its work, memory and time on a cluster. PyTorch is imported only for classes of a user's own."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import count as naturals
from typing import TypeGuard

from ..config.precision import PRECISIONS
from ..config.problems import ConfigError, Problem
from ..data.assignment import Assigner
from ..models.config import DecoderConfig, ModelConfig
from ..parallel.config import ParallelConfig
from ..parallel.division import divide_blocks
from ..parallel.layout import Layout
from ..parallel.pipeline.stages import legal_micro_batches
from ..parallel.policies import fused_experts_blocker, fused_swiglu_blocker
from ..planner.cluster import ClusterConfig
from ..planner.cost import LayoutCost, layout_cost
from ..planner.engines import engine_cost
from ..planner.memory import Job, OptimizerBytes, optimizer_bytes
from ..planner.offload import OffloadAccount
from ..planner.parameters import Inventory, decoder_inventory
from ..planner.prediction import Prediction
from ..planner.step_time import Step, matrices_of
from .derived import activation_settings, run_length
from .schema import RunConfig


def is_known_decoder(model: ModelConfig) -> TypeGuard[DecoderConfig]:
    """Return whether a model's parameters follow from its config: it has no router of a user's own class."""
    return isinstance(model, DecoderConfig) and model.experts.parts.router is None


def inventory_of(config: RunConfig) -> Inventory:
    """List the model's parameters. Raises ConfigError for a model that is no decoder."""
    vocabulary = config.model.vocabulary or config.data.known_vocabulary
    assert isinstance(vocabulary, int)
    if is_known_decoder(config.model):
        return decoder_inventory(replace(config.model, vocabulary=vocabulary))
    from ..planner.built_model import model_inventory
    from .build import build_model

    model = build_model(config.model, vocabulary)
    if model.decoder_config is None:
        message = "only the costs of decoders are known"
        raise ConfigError([Problem("model", message, "plan with a model of the recipes, or give yours a decoder_config")])
    return model_inventory(model, config.parallel.tp)


def optimizer_of(config: RunConfig) -> OptimizerBytes:
    """Return the count of what the optimizer keeps."""
    if (known := optimizer_bytes(config.optim)) is not None:
        return known
    from ..planner.built_model import tried_optimizer
    from .build import optimizer_factory

    return tried_optimizer(optimizer_factory(config.optim))


def planned_layout(config: RunConfig, world_size: int) -> Layout:
    """Return the layout that is planned: under local updating that of an island, all of which are alike."""
    return Layout.plan(config.parallel, world_size, config.islands_on(world_size)).of_one_island()


def assigner_of(config: RunConfig, layout: Layout, islands: int = 1, island: int = 0) -> Assigner:
    """Return what deals global batches, or one of so many islands' part of them, to the data ranks of an island.

    layout: that of an island, or of all of them together
    """
    can_run = functools.partial(legal_micro_batches, config.parallel)
    return Assigner(layout.data_size, can_run, config.optim.compares_halves(), islands, island)


def job_of(
    config: RunConfig, shape: DecoderConfig, assigner: Assigner, *, fused: bool | None, per_host: int | None = None
) -> Job:
    """Return the work of a step. fused: see `with_kernels`; per_host: see `Job`.

    Raises ConfigError for an activation budget that nothing keeps to.
    """
    trainer, samples = config.trainer, config.batch.samples
    assert isinstance(samples, int)
    try:
        policies, _ = divide_blocks(shape, shape.layers, config.parallel, activation_settings(config), config.data.seq_len)
    except ValueError as error:
        raise ConfigError([Problem("trainer.activation_budget", str(error), "give it more")]) from error
    job = Job(
        seq_len=config.data.seq_len,
        micro=min(config.batch.micro_size, samples),
        micro_batches=assigner.passes(samples, config.batch.micro_size),
        precision=config.precision,
        policies=list(policies),
        compiled=trainer.compile,
        float8=trainer.float8,
        masters=trainer.masters,
        per_host=per_host,
    )
    row = config.parallel.hdp_tokens
    if config.parallel.hdp != "none" and row is not None:  # documents are known by their tokens alone
        rows = -(-samples * config.data.seq_len // (assigner.data_size * row))
        job = replace(job, row=row, micro_batches=next(count for count in naturals(rows) if assigner.can_run(count)))
    return with_kernels(job, shape, config.parallel, fused=fused)


def with_kernels(job: Job, shape: DecoderConfig, parallel: ParallelConfig, *, fused: bool | None) -> Job:
    """Say which kernels compute the products. fused: whether the GPUs have those with SwiGLU inside; None: it is not known."""
    swiglu = bool(fused) and fused_swiglu_blocker(shape, parallel, job) is None
    experts = fused if fused_experts_blocker(shape, parallel, job) is None else False
    return replace(job, fused=swiglu, fused_experts=experts)


def costs_of(
    model: Inventory, parallel: ParallelConfig, layout: Layout, job: Job, optimizer: OptimizerBytes
) -> tuple[LayoutCost, OffloadAccount, list[int]]:
    """Compute what every rank's GPU holds, what the first rank offloads, and every rank's weights and optimizer state.

    The last are in bytes, wherever they lie. A pipeline offloads nothing; without one all ranks offload the same.
    """
    cost = layout_cost(model, parallel, layout, job, optimizer)
    held = [rank.elements * PRECISIONS[job.precision].accum_bytes + (rank.optimizer or 0) for rank in cost.ranks]
    ranks, away = zip(*(engine_cost(rank, model, parallel, layout, job) for rank in cost.ranks), strict=True)
    return replace(cost, ranks=list(ranks)), away[0], held


def run_tokens(config: RunConfig) -> float:
    """Return the tokens of the whole run, with the batch that it begins with."""
    if config.trainer.tokens is not None:
        return config.trainer.tokens
    samples = config.batch.samples
    assert isinstance(samples, int)
    return run_length(config.trainer).value * samples * config.data.seq_len


class Costing:
    """Costs settings of one run on a cluster: what does not depend on the settings is counted once."""

    def __init__(self, config: RunConfig, world_size: int, cluster: ClusterConfig) -> None:
        self._model, self._optimizer = inventory_of(config), optimizer_of(config)
        self._layout, self._islands = planned_layout(config, world_size), config.islands_on(world_size)
        self._cluster = replace(cluster, gpus=world_size)

    def predict(self, config: RunConfig) -> Prediction:
        """Predict the run of a config of the same model, optimizer and layout."""
        samples = config.batch.start
        assigner, per_host = assigner_of(config, self._layout, self._islands), self._cluster.gpus_per_node
        job = job_of(config, self._model.shape, assigner, fused=None, per_host=per_host)
        cost, away, _ = costs_of(self._model, config.parallel, self._layout, job, self._optimizer)
        step = Step(
            self._model.shape, config.parallel, self._layout, job, cost, away, self._cluster,
            matrices=matrices_of(config.optim, self._model), saving=config.checkpoint, islands=self._islands,
        )  # fmt: skip
        return Prediction(step, samples, run_tokens(config))
