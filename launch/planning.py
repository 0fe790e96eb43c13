"""Plan a run: what it would need of its processes, by arithmetic. PyTorch is imported only for classes of a user's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..config.nodes import Custom
from ..config.precision import PRECISIONS
from ..config.problems import ConfigError, Problem
from ..data.assignment import Assigner
from ..models.config import DecoderConfig
from ..models.costs import ForwardPass
from ..optim.build import build_controller
from ..optim.local.rounds import Rounds
from ..optim.optimizers.matrix_config import MatrixOptimConfig
from ..optim.progress import Progress
from ..parallel.config import ParallelConfig
from ..parallel.exchange_levels import describe as describe_exchange
from ..parallel.hybrid.cost import decoder_flops
from ..parallel.layout import Layout
from ..planner.checkpoint_needs import CheckpointNeeds, checkpoint_needs, describe_needs
from ..planner.cluster import ClusterConfig
from ..planner.cost import LayoutCost, drawn, level_bytes
from ..planner.hybrid import DealtStep, dealt_step, with_rows_on_host
from ..planner.memory import Cutter, Job, optimizer_bytes
from ..planner.network import gradient_levels, matrix_levels
from ..planner.offload import OffloadAccount, describe
from ..planner.parameters import Inventory
from ..planner.search import KEYS
from ..trainer.blanks import blank_notice
from ..trainer.costs import (
    assigner_of,
    costs_of,
    inventory_of,
    is_known_decoder,
    job_of,
    optimizer_of,
    planned_layout,
    with_kernels,
)
from ..trainer.derived import build_horizon
from ..trainer.hybrid import hidden_copies, hybrid_dealer
from ..trainer.launching import planned_processes
from ..trainer.machine_gpus import planned_machine
from ..trainer.measured_steps import ranks_share_workers
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
    samples  global batch of the whole run, at its start where it changes
    notes    remarks on the figures
    dealt    the first step's documents under hybrid data parallelism; None without
    islands  of the run (`optim.local`); layout, costs and what a process needs are those of one, and all are alike
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
    dealt: DealtStep | None = None
    islands: int = 1

    @property
    def processes(self) -> int:
        """Processes of the whole run, of all islands."""
        return self.islands * self.layout.world_size

    @property
    def bytes(self) -> int:
        """Peak bytes of the rank that needs most."""
        return max(rank.total for rank in self.cost.ranks)


def resolve_plan(overrides: Sequence[str], config_dir: str | None = None, cluster: ClusterConfig | None = None) -> ResolvedRun:
    """Resolve a command line as a plan does: data may lie elsewhere, and nothing is resumed. Does not refuse its problems.

    cluster: the machines to which automatic values are fitted; None: this machine's GPUs, or else H100s
    """
    options = ResolveOptions(
        lambda config: planned_processes(config.launch),
        resumes=False,
        data_elsewhere=True,
        builds=needs_building,
        machine=planned_machine if cluster is None else lambda _: cluster,
    )
    resolved = resolve(overrides, options, config_dir)
    here = [problem for problem in resolved.problems if problem.lacks]
    others = tuple(problem for problem in resolved.problems if problem not in here)
    return replace(resolved, problems=others, notices=(*resolved.notices, *map(str, here)))


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
    return own or not is_known_decoder(config.model) or config.trainer.float8 != "none"


def checked_plan(config: RunConfig, *, fused: bool | None, documents: Sequence[int] | None = None) -> Plan:
    """Plan a config that is not checked yet: see `plan_of`. Raises ConfigError with its problems."""
    elsewhere: list[Problem] = []
    config, problems = checked_config(config, planned_processes(config.launch), elsewhere=elsewhere, builds=needs_building)
    if problems:
        raise ConfigError(problems)
    return plan_of(config, list(map(str, elsewhere)), fused=fused, documents=documents)


def plan_of(
    config: RunConfig,
    notices: Sequence[str],
    *,
    fused: bool | None = None,
    documents: Sequence[int] | None = None,
    per_host: int | None = None,
) -> Plan:
    """Plan a config without problems.

    notices: further remarks. fused: see `trainer.costs.with_kernels`. documents: lengths of those
    of a step, which hybrid data parallelism deals; None: each sample is one. per_host: ranks of a host; None: by launch.nodes.
    Raises ConfigError for a run whose costs are not known.
    """
    if problems := unplanned_problems(config):
        raise ConfigError(problems)
    parallel, samples = config.parallel, config.batch.samples
    assert isinstance(samples, int)
    processes = planned_processes(config.launch)
    layout, islands = planned_layout(config, processes), config.islands_on(processes)
    assigner = assigner_of(config, layout, islands)
    notes = [*notices, *_batch_notes(config, assigner), *_island_notes(config, islands)]
    model = inventory_of(config)
    job = job_of(config, model.shape, assigner, fused=fused, per_host=per_host or processes // config.launch.most_nodes)
    dealt: DealtStep | None = None
    if parallel.hdp != "none":
        job, dealt = _deal(config, layout, model.shape, job, documents)
        notes += _dealing_notes(dealt, documents)
    cost, away, held = costs_of(model, parallel, layout, job, optimizer_of(config))
    notes += describe(away)
    if dealt is not None:
        cost, away = _with_dealt(cost, away, dealt, model.shape, job.forward_pass(parallel))
        notes += _pinning_notes(dealt, model.shape)
    if config.optim.local.active:
        notes.append(_exchange_note(config, cost, model))
    needs = checkpoint_needs(config.checkpoint, layout, held, [rank.experts / rank.elements for rank in cost.ranks])
    needs = replace(needs, step=islands * needs.step - _saved_once(config, model, islands))
    notes += [
        *describe_needs(needs),
        "weights, gradients and optimizer state are exact; activations and working memory are estimates, and what CUDA,"
        " NCCL and the allocator take is not in them",
        *_caveats(parallel),
    ]
    cost = drawn(cost, model.shape, parallel, job)
    return Plan(model, parallel, layout, job, cost, away, needs, samples, notes, dealt, islands)


def _batch_notes(config: RunConfig, assigner: Assigner) -> Iterator[str]:
    """Yield what the figures take for granted of the vocabulary and the batches, and the blanks of the first batch."""
    if not config.model.vocabulary:
        vocabulary = config.data.known_vocabulary
        yield f"a vocabulary of {vocabulary:,} tokens, as data.vocabulary asks for; the tokenizer has the last word"
    if config.batch.name != "fixed":
        samples = config.batch.samples
        yield f"the batch size changes during the run; these are the figures of its start, {samples} samples"
    if ranks_share_workers(config):
        yield f"what steps take in which batch={config.batch.name} measures gradients is not in these figures"
    controller = build_controller(config.batch, build_horizon(config, config.data.seq_len))
    blanks = blank_notice(assigner, controller, Progress())
    if blanks is not None and config.parallel.hdp == "none":
        yield blanks


def _island_notes(config: RunConfig, islands: int) -> Iterator[str]:
    if config.optim.local.active:
        yield (
            f"optim.local: the layout and what each rank holds are those of one of {islands} islands, which are alike; the time"
            " in which differences travel is not in the figures"
        )


def _saved_once(config: RunConfig, model: Inventory, islands: int) -> int:
    """Return the bytes by which a checkpoint is smaller than those of so many runs like an island, each by itself.

    All islands have the same outer weights and momentum. Of an optimizer whose state is not known these are not counted at all.
    """
    if optimizer_bytes(config.optim) is None:
        return 0
    elements = sum(each.numel for each in model.parameters)
    return (islands - 1) * config.optim.local.common_arrays * elements * PRECISIONS[config.precision].accum_bytes


def _deal(
    config: RunConfig, layout: Layout, shape: DecoderConfig, job: Job, documents: Sequence[int] | None
) -> tuple[Job, DealtStep]:
    """Deal the first step's documents, or its samples. Return the job in rows of documents, and the dealt step."""
    dealer = hybrid_dealer(config, layout, shape, decoder_flops(shape))
    samples = config.batch.samples
    assert isinstance(samples, int)
    lengths = documents or [job.seq_len] * samples
    hidden = hidden_copies(config, layout, shape)
    dealt = dealt_step(lengths, dealer, job.seq_len, job.micro, hidden, shape.layers)
    return replace(job, row=dealer.row_tokens(job.seq_len, job.micro), micro_batches=dealt.rows), dealt


def _dealing_notes(dealt: DealtStep, documents: Sequence[int] | None) -> Iterator[str]:
    if documents is None:
        yield "each sample is taken for one document; --documents says what they are, or takes the data's own"
    yield (
        f"parallel.hdp: the first step's documents lie in up to {dealt.rows} rows a rank, {dealt.shared} are shared, and by"
        f" the plan ranks wait {dealt.waiting:.1%} of the time; messages of shared ones are not counted"
    )


def _with_dealt(
    cost: LayoutCost, away: OffloadAccount, dealt: DealtStep, shape: DecoderConfig, work: ForwardPass
) -> tuple[LayoutCost, OffloadAccount]:
    """Count only what rows are filled with, and move to the host what rows keep there. work: of a full row."""
    ranks = [replace(rank, flops=rank.flops * dealt.filled) for rank in cost.ranks]
    cost = replace(cost, ranks=ranks, model_flops=cost.model_flops * dealt.filled)
    return with_rows_on_host(cost, dealt, shape, work), replace(away, host=away.host + dealt.pinned_bytes)


def _pinning_notes(dealt: DealtStep, shape: DecoderConfig) -> Iterator[str]:
    if dealt.pinned_bytes:
        yield (
            f"parallel.hdp_offload: whatever its documents, a full row keeps the activations of {dealt.on_host} of"
            f" {shape.layers} blocks on the host; with longer ones it keeps more, which the memory of GPUs here does not"
            f" count on, and each process may pin {dealt.pinned_bytes / 2**30:.3g} GiB of host memory"
        )


def _exchange_note(config: RunConfig, cost: LayoutCost, model: Inventory) -> str:
    """Say what an exchange between islands needs: differences, and all of them in one buffer, of a fragment's elements."""
    local, rank = config.optim.local, cost.ranks[0]
    arrays = 1 if local.delay else 2
    sizes = {each.name: each.numel for each in model.parameters}
    fragments = Rounds(local).split({each.name: each.layer for each in model.parameters})
    largest = max(sum(sizes[name] for name in names) for names in fragments) / sum(sizes.values())
    need = arrays * largest * rank.elements * PRECISIONS[config.precision].accum_bytes
    at_most = "for its largest fragment" if local.fragments > 1 else "of all weights that it updates"
    return (
        f"optim.local: an exchange takes {need / 2**30:.3g} GiB more on a rank ({at_most}), between steps, when no activations"
        " are there"
    )


def spared_by_fusing(plan: Plan, config: RunConfig) -> int:
    """Return the bytes that fused SwiGLU would save on the rank that needs most; 0 where the run can't use it."""
    job = with_kernels(plan.job, plan.model.shape, plan.parallel, fused=True)
    if job == plan.job:
        return 0
    cost, *_ = costs_of(plan.model, plan.parallel, plan.layout, job, optimizer_of(config))
    if plan.dealt is not None:
        cost = with_rows_on_host(cost, plan.dealt, plan.model.shape, job.forward_pass(plan.parallel))
    return plan.bytes - replace(plan, cost=cost).bytes


def unplanned_problems(config: RunConfig) -> list[Problem]:
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
    return [f"what optim={config.optim.name} computes and sends for whole matrices was never held to a measured run"]


def exchange_notes(plan: Plan, config: RunConfig) -> list[str]:
    """Say how gradients and whole matrices travel, where the run is on several hosts."""
    parallel, layout, per_host = plan.parallel, plan.layout, plan.job.per_host
    if per_host is None or layout.world_size <= per_host:
        return []
    found: list[str] = []
    if parallel.exchanges_rows and layout.weight_ranks > 1:
        stage = plan.model.stage(range(plan.model.shape.layers), first=True, last=True)
        need = level_bytes([group for group in Cutter(layout).cut(stage) if not group.experts], parallel, layout, plan.job)
        more = f"; sums that go on take up to {need / 2**30:.3g} GiB on a rank" if need else ""
        found.append(f"{describe_exchange(gradient_levels(parallel, layout, per_host))} (parallel.gradient_exchange){more}")
    if isinstance(config.optim, MatrixOptimConfig) and layout.stage_ranks > 1:
        levels = matrix_levels(parallel, layout, per_host)
        found.append(f"{describe_exchange(levels, 'whole matrices travel')} (parallel.gradient_exchange)")
    return found


def _caveats(parallel: ParallelConfig) -> list[str]:
    """List what this layout does not do although its name promises it."""
    if parallel.pp == 1 or parallel.zero < 2:
        return []
    whole = "gradients are reduced once, at the end of a step: through a pipeline ZeRO-2 needs what ZeRO-1 needs"
    if parallel.zero == 3:
        return [whole, "and weights are gathered once: ZeRO-3 shards them between steps only"]
    return [whole]
