"""Plan a run: what it would need of its processes, by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config.precision import PRECISIONS
from ..config.problems import ConfigError, Problem
from ..models.protocol import Model, decoder_shape
from ..optim.build import build_controller
from ..optim.progress import Progress
from ..parallel.config import ParallelConfig
from ..parallel.layout import Layout
from ..parallel.policies import fused_swiglu_blocker
from ..planner.checkpoint_needs import CheckpointNeeds, checkpoint_needs, describe_needs
from ..planner.cost import LayoutCost, layout_cost
from ..planner.engines import engine_cost
from ..planner.memory import Job
from ..planner.offload import OffloadAccount, describe
from ..trainer.blanks import blank_notice
from ..trainer.build import build_assigner, build_model, engine_settings, optimizer_factory
from ..trainer.derived import build_horizon
from ..trainer.launching import planned_processes
from ..trainer.resolve import ResolveOptions, resolve
from ..trainer.schema import RunConfig
from ..trainer.validate import checked_config


@dataclass(frozen=True)
class Plan:
    """The plan of a run: its layout, costs and needs, computed without starting it.

    model    on the meta device
    away     what its first rank offloads
    needs    what its checkpoints take
    samples  global batch, at its start where it changes
    notes    remarks on the figures
    """

    model: Model
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


def make_plan(overrides: Sequence[str], config_dir: str | None = None) -> Plan:
    """Plan the run of a command line. Raises ConfigError with everything that keeps it from running.

    Data that are not on this machine do not matter here: they become a note.
    """
    options = ResolveOptions(lambda config: planned_processes(config.launch), resumes=False, data_elsewhere=True)
    resolved = resolve(overrides, options, config_dir)
    resolved.refuse()
    return plan_of(resolved.config, resolved.notices)


def checked_plan(config: RunConfig, *, fused: bool) -> Plan:
    """Plan a config that is not checked yet: see `plan_of`. Raises ConfigError with its problems."""
    elsewhere: list[Problem] = []
    config, problems = checked_config(config, planned_processes(config.launch), elsewhere=elsewhere)
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
    vocabulary = config.model.vocabulary or config.data.known_vocabulary
    assert isinstance(vocabulary, int)
    if not config.model.vocabulary:
        notes.append(f"a vocabulary of {vocabulary:,} tokens, as data.vocabulary asks for; the tokenizer has the last word")
    if config.batch.name != "fixed":
        notes.append(f"the batch size changes during the run; these are the figures of its start, {samples} samples")
    assigner = build_assigner(config, layout)
    controller = build_controller(config.batch, build_horizon(config, config.data.seq_len))
    blanks = blank_notice(assigner, controller, Progress())
    notes += [] if blanks is None else [blanks]
    model = build_model(config.model, vocabulary)
    if model.decoder_config is None:
        message = "only the costs of decoders are known"
        raise ConfigError([Problem("model", message, "plan with a model of the recipes, or give yours a decoder_config")])
    try:
        settings = engine_settings(config, model, config.data.seq_len)
    except ValueError as error:
        raise ConfigError([Problem("trainer.activation_budget", str(error), "give it more")]) from error
    job = Job(
        seq_len=config.data.seq_len,
        micro=min(config.batch.micro, samples),
        micro_batches=assigner.passes(samples, config.batch.micro),
        precision=config.precision,
        policies=list(settings.policies),
        compiled=config.trainer.compile,
        fused=fused and fused_swiglu_blocker(decoder_shape(model), parallel, settings) is None,
    )
    cost, away, held = _costs(config, model, parallel, layout, job)
    needs = checkpoint_needs(config.checkpoint, layout, held)
    notes += [*describe(away), *describe_needs(needs)]
    notes += [
        "weights, gradients and optimizer state are exact; activations and working memory are estimates, and what CUDA,"
        " NCCL and the allocator take is not in them",
        *_caveats(parallel),
    ]
    return Plan(model, parallel, layout, job, cost, away, needs, samples, notes)


def _costs(
    config: RunConfig, model: Model, parallel: ParallelConfig, layout: Layout, job: Job
) -> tuple[LayoutCost, OffloadAccount, list[int]]:
    """Compute what every rank's GPU holds, what the first rank offloads, and every rank's weights and optimizer state.

    The last are in bytes, wherever they lie. A pipeline offloads nothing; without one all ranks offload the same.
    """
    cost = layout_cost(model, parallel, layout, job, optimizer_factory(config.optim))
    held = [rank.elements * PRECISIONS[job.precision].accum_bytes + (rank.optimizer or 0) for rank in cost.ranks]
    ranks, away = zip(*(engine_cost(rank, model, parallel, layout, job) for rank in cost.ranks), strict=True)
    return replace(cost, ranks=list(ranks)), away[0], held


def spared_by_fusing(plan: Plan, config: RunConfig) -> int:
    """Return the bytes that fused SwiGLU would save on the rank that needs most; 0 where the run can't use it."""
    if fused_swiglu_blocker(decoder_shape(plan.model), plan.parallel, engine_settings(config, plan.model)) is not None:
        return 0
    cost, *_ = _costs(config, plan.model, plan.parallel, plan.layout, replace(plan.job, fused=True))
    return plan.bytes - replace(plan, cost=cost).bytes


def _unplanned(config: RunConfig) -> list[Problem]:
    """List the problems of a config that runs but whose costs are not known well enough to plan."""
    sizes = {
        "batch.samples": config.batch.samples,
        "model.vocabulary": config.model.vocabulary or config.data.known_vocabulary,
    }
    return [Problem(key, "is not known before the run", f"give a number as {key}=…") for key, size in sizes.items() if not size]


def _caveats(parallel: ParallelConfig) -> list[str]:
    """List what this layout does not do although its name promises it."""
    if parallel.pp == 1 or parallel.zero < 2:
        return []
    whole = "gradients are reduced once, at the end of a step: through a pipeline ZeRO-2 needs what ZeRO-1 needs"
    if parallel.zero == 3:
        return [whole, "and weights are gathered once: ZeRO-3 shards them between steps only"]
    return [whole]
