"""Plan a run: what it would need of its processes, by arithmetic. PyTorch is imported only for classes of a user's own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config.nodes import Custom
from ..config.precision import PRECISIONS
from ..config.problems import ConfigError, Problem
from ..data.assignment import Assigner
from ..models.config import DecoderConfig
from ..optim.build import build_controller
from ..optim.optimizers.matrix_config import MatrixOptimConfig
from ..optim.progress import Progress
from ..parallel.config import ParallelConfig
from ..parallel.division import divide_blocks
from ..parallel.layout import Layout
from ..parallel.pipeline.stages import legal_micro_batches
from ..parallel.policies import ActivationSettings, fused_swiglu_blocker
from ..planner.checkpoint_needs import CheckpointNeeds, checkpoint_needs, describe_needs
from ..planner.cost import LayoutCost, drawn, layout_cost
from ..planner.engines import engine_cost
from ..planner.memory import Job, OptimizerBytes, optimizer_bytes
from ..planner.offload import OffloadAccount, describe
from ..planner.parameters import Inventory, decoder_inventory
from ..planner.search import KEYS
from ..trainer.blanks import blank_notice
from ..trainer.derived import build_horizon
from ..trainer.launching import planned_processes
from ..trainer.resolve import ResolvedRun, ResolveOptions, resolve
from ..trainer.schema import RunConfig
from ..trainer.validate import checked_config
from .typed_words import given_keys


@dataclass(frozen=True)
class Plan:
    """The plan of a run: its layout, costs and needs, computed without starting it.

    model    the shape of the decoder and its parameters
    away     what its first rank offloads
    needs    what its checkpoints take
    samples  global batch, at its start where it changes
    notes    remarks on the figures
    """

    model: Inventory
    parallel: ParallelConfig
    layout: Layout
    job: Job
    cost: LayoutCost
    away: OffloadAccount
    needs: CheckpointNeeds
    samples: int
    notes: list[str]

    @property
    def bytes(self) -> int:
        """Peak bytes of the rank that needs most."""
        return max(rank.total for rank in self.cost.ranks)


def resolve_plan(overrides: Sequence[str], config_dir: str | None = None) -> ResolvedRun:
    """Resolve a command line as a plan does: data may lie elsewhere, and nothing is resumed. Does not refuse its problems."""
    options = ResolveOptions(
        lambda config: planned_processes(config.launch), resumes=False, data_elsewhere=True, builds=needs_building
    )
    return resolve(overrides, options, config_dir)


def is_searched(problem: Problem, typed: set[str]) -> bool:
    """Return whether a problem of the run as written is of keys that the search varies, and nobody typed."""
    sizes = {"parallel.tp", "parallel.pp", "parallel.cp", "parallel.replicate", "parallel.ep"}
    meant = sizes if problem.key == "parallel" else {problem.key}
    return (problem.key.partition(".")[0] == "parallel" or problem.key in KEYS) and not meant & typed


def without_searched(resolved: ResolvedRun, words: Sequence[str]) -> ResolvedRun:
    """Leave out the problems that another layout mends."""
    typed = given_keys(words)
    return replace(resolved, problems=tuple(each for each in resolved.problems if not is_searched(each, typed)))


def make_plan(overrides: Sequence[str], config_dir: str | None = None) -> Plan:
    """Plan the run of a command line. Raises ConfigError with everything that keeps it from running.

    Data that are not on this machine do not matter here: they become a note.
    """
    resolved = resolve_plan(overrides, config_dir)
    resolved.refuse()
    return plan_of(resolved.config, resolved.notices)


def needs_building(config: RunConfig) -> bool:
    """Return whether only building the run's objects shows all of its problems: classes of a user's own, or of torchao."""
    groups = (config.model, config.data, config.optim, config.schedule, config.batch)
    own = any(isinstance(group, Custom) for group in groups) or bool(config.trainer.hooks)
    return own or not isinstance(config.model, DecoderConfig) or config.trainer.float8 != "none"


def checked_plan(config: RunConfig, *, fused: bool) -> Plan:
    """Plan a config that is not checked yet: see `plan_of`. Raises ConfigError with its problems."""
    elsewhere: list[Problem] = []
    config, problems = checked_config(config, planned_processes(config.launch), elsewhere=elsewhere, builds=needs_building)
    if problems:
        raise ConfigError(problems)
    return plan_of(config, list(map(str, elsewhere)), fused=fused)


def plan_of(config: RunConfig, notices: Sequence[str], *, fused: bool = False) -> Plan:
    """Plan a config without problems.

    notices: further remarks. fused: whether the GPUs have fused SwiGLU, for runs that can use it. Raises ConfigError for a run
    whose costs are not known.
    """
    if problems := _unplanned(config):
        raise ConfigError(problems)
    notes = list(notices)
    parallel, samples = config.parallel, config.batch.samples
    assert isinstance(samples, int)
    layout = Layout.plan(parallel, planned_processes(config.launch))
    if not config.model.vocabulary:
        vocabulary = config.data.known_vocabulary
        notes.append(f"a vocabulary of {vocabulary:,} tokens, as data.vocabulary asks for; the tokenizer has the last word")
    if config.batch.name != "fixed":
        notes.append(f"the batch size changes during the run; these are the figures of its start, {samples} samples")
    assigner = assigner_of(config, layout)
    controller = build_controller(config.batch, build_horizon(config, config.data.seq_len))
    blanks = blank_notice(assigner, controller, Progress())
    if parallel.hdp != "none":
        notes.append(f"parallel.hdp={parallel.hdp} is not planned for: memory and time are those of batch.micro samples")
    elif blanks is not None:
        notes.append(blanks)
    model = inventory_of(config)
    job = job_of(config, model.shape, assigner, fused=fused)
    cost, away, held = costs_of(model, parallel, layout, job, optimizer_of(config))
    shares = [rank.experts / rank.elements for rank in cost.ranks]
    needs = checkpoint_needs(config.checkpoint, layout, held, shares)
    notes += [*describe(away), *describe_needs(needs)]
    notes += [
        "weights, gradients and optimizer state are exact; activations and working memory are estimates, and what CUDA,"
        " NCCL and the allocator take is not in them",
        *_caveats(parallel),
    ]
    return Plan(model, parallel, layout, job, drawn(cost, model.shape, parallel, job), away, needs, samples, notes)


def inventory_of(config: RunConfig) -> Inventory:
    """List the model's parameters. Raises ConfigError for a model that is no decoder."""
    vocabulary = config.model.vocabulary or config.data.known_vocabulary
    assert isinstance(vocabulary, int)
    if isinstance(config.model, DecoderConfig):
        return decoder_inventory(replace(config.model, vocabulary=vocabulary))
    from ..planner.built_model import model_inventory
    from ..trainer.build import build_model

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
    from ..trainer.build import optimizer_factory

    return tried_optimizer(optimizer_factory(config.optim))


def assigner_of(config: RunConfig, layout: Layout) -> Assigner:
    """Return what deals global batches to the data ranks."""
    can_run = functools.partial(legal_micro_batches, config.parallel)
    return Assigner(layout.data_size, can_run, config.optim.compares_halves())


def job_of(config: RunConfig, shape: DecoderConfig, assigner: Assigner, *, fused: bool) -> Job:
    """Return the work of a step. Raises ConfigError for an activation budget that nothing keeps to."""
    trainer, samples = config.trainer, config.batch.samples
    assert isinstance(samples, int)
    settings = ActivationSettings(trainer.activation, trainer.activation_budget, config.precision, trainer.compile)
    try:
        policies, _ = divide_blocks(shape, shape.layers, config.parallel, settings, config.data.seq_len)
    except ValueError as error:
        raise ConfigError([Problem("trainer.activation_budget", str(error), "give it more")]) from error
    job = Job(
        seq_len=config.data.seq_len,
        micro=min(config.batch.micro, samples),
        micro_batches=assigner.passes(samples, config.batch.micro),
        precision=config.precision,
        policies=list(policies),
        compiled=trainer.compile,
        float8=trainer.float8,
    )
    return replace(job, fused=fused and fused_swiglu_blocker(shape, config.parallel, job) is None)


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


def spared_by_fusing(plan: Plan, config: RunConfig) -> int:
    """Return the bytes that fused SwiGLU would save on the rank that needs most; 0 where the run can't use it."""
    if fused_swiglu_blocker(plan.model.shape, plan.parallel, plan.job) is not None:
        return 0
    job = replace(plan.job, fused=True)
    cost, *_ = costs_of(plan.model, plan.parallel, plan.layout, job, optimizer_of(config))
    return plan.bytes - replace(plan, cost=cost).bytes


def _unplanned(config: RunConfig) -> list[Problem]:
    """List the problems of a config that runs but whose costs are not known well enough to plan."""
    sizes = {
        "batch.samples": config.batch.samples,
        "model.vocabulary": config.model.vocabulary or config.data.known_vocabulary,
    }
    return [Problem(key, "is not known before the run", f"give a number as {key}=…") for key, size in sizes.items() if not size]


def time_caveats(config: RunConfig) -> list[str]:
    """List what predicted times of this run leave out."""
    if not isinstance(config.optim, MatrixOptimConfig):
        return []
    own = f"what optim={config.optim.name} computes and sends for whole matrices comes on top"
    return [f"times are of AdamW's update: {own}, once a step"]


def _caveats(parallel: ParallelConfig) -> list[str]:
    """List what this layout does not do although its name promises it."""
    if parallel.pp == 1 or parallel.zero < 2:
        return []
    whole = "gradients are reduced once, at the end of a step: through a pipeline ZeRO-2 needs what ZeRO-1 needs"
    if parallel.zero == 3:
        return [whole, "and weights are gathered once: ZeRO-3 shards them between steps only"]
    return [whole]
