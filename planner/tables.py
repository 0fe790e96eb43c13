"""The tables of `meshloom plan`: the mesh, who holds what, memory, and the step's work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Column, Table
from rich.text import Text

from ..models.config import DecoderConfig
from ..models.costs import parameter_count
from ..parallel.config import ParallelConfig
from ..parallel.layout import AXES, Layout
from .cost import KINDS, LayoutCost, RankCost
from .memory import Job

GIB = 2**30
MEANING = {
    "pp": "pipeline: stages of the model",
    "replicate": "copies of the sharded model",
    "shard": "data parallel, sharded by ZeRO",
    "cp": "context parallel: parts of the same samples",
    "tp": "tensor parallel: parts of the same matrices",
    "expert_copies": "the same ranks as experts see them: copies of experts",
    "expert_weights": "parts of the same experts, sharded by ZeRO",
    "ep": "expert parallel: other experts of every mixture",
}


def right(header: str) -> Column:
    """Make a right-aligned column of numbers."""
    return Column(header, justify="right")


def plan_tables(
    model: DecoderConfig, parallel: ParallelConfig, layout: Layout, job: Job, cost: LayoutCost, samples: int
) -> Iterator[Table | Text]:
    """Make all tables of a plan, in the order of printing."""
    count = f"{layout.world_size} processes: " if layout.world_size > 1 else ""
    yield Text(f"\n{count}{layout.describe()}", style="bold")
    if layout.world_size > 1:
        yield mesh_table(layout)
    yield holders_table(layout, cost)
    yield memory_table(cost)
    yield step_table(model, parallel, job, cost, samples)


def axis_groups(layout: Layout, axis: str) -> list[list[int]]:
    """List the groups of ranks that differ along this axis alone, in order of their first rank."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank) if axis in AXES else layout.expert_coordinates(rank)
        groups.setdefault(tuple(index for other, index in at.items() if other != axis), []).append(rank)
    return list(groups.values())


def written_ranks(ranks: Sequence[int]) -> str:
    """Format ranks briefly: `0–3`, `0, 4, 8, …, 60`."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}–{ranks[-1]}"
    if len(ranks) > 5:
        return f"{', '.join(map(str, ranks[:3]))}, …, {ranks[-1]}"
    return ", ".join(map(str, ranks))


def mesh_table(layout: Layout) -> Table:
    """Tabulate the axes larger than one, outermost first, with the ranks of each group; under `ep` also those of experts."""
    table = Table("axis", right("size"), "meaning", "ranks that talk", title="Mesh", title_justify="left", box=box.SIMPLE)
    sizes = layout.sizes | (layout.expert_sizes if layout.ep > 1 else {})
    for axis, size in sizes.items():
        if size == 1:
            continue
        groups = axis_groups(layout, axis)
        shown = " | ".join(written_ranks(group) for group in groups[:3])
        rest = f" | … {len(groups)} groups" if len(groups) > 3 else ""
        meaning = "copies of the model" if axis == "replicate" and layout.zero == 0 else MEANING[axis]
        table.add_row(axis, str(size), meaning, shown + rest)
    return table


def holders_table(layout: Layout, cost: LayoutCost) -> Table:
    """Tabulate which ranks hold which part of the model, and how much of it each."""
    columns = ["parameters per rank", *(["of experts"] if layout.ep > 1 else [])]
    table = Table("ranks", "holds", *map(right, columns), title="Who holds what", title_justify="left", box=box.SIMPLE)
    per_stage = layout.world_size // layout.pp
    for pp, rank in enumerate(cost.ranks):
        ranks = range(pp * per_stage, (pp + 1) * per_stage)
        numbers = [rank.elements, rank.experts][: len(columns)]
        table.add_row(written_ranks(ranks), parts_held(cost, pp), *(f"{number:,}" for number in numbers))
    return table


def parts_held(cost: LayoutCost, pp: int) -> str:
    """Name the parts of the model on a pipeline coordinate: `embedding, layers 0–9 + layers 20–29`."""
    written: list[str] = []
    for stage in cost.plan.held_by(pp):
        layers = cost.plan.layers[stage]
        parts = ["embedding"] if stage == 0 else []
        parts.append(f"layers {layers[0]}–{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}")
        parts += ["norm and head"] if stage == cost.plan.count - 1 else []
        written.append(", ".join(parts))
    return " + ".join(written)


def memory_table(cost: LayoutCost) -> Table:
    """Tabulate the peak GiB per rank of each kind. Gradients, activations and the update do not peak together."""
    columns = [right(kind) for kind in (*KINDS, "at most")]
    table = Table("pp", *columns, title="Memory per rank, GiB", title_justify="left", box=box.SIMPLE)
    for pp, rank in enumerate(cost.ranks):
        values = [getattr(rank, kind) for kind in KINDS]
        cells = ["unknown" if value is None else gib(value) for value in values]
        table.add_row(str(pp), *cells, Text(gib(rank.total) + ("+" if rank.optimizer is None else ""), style="bold"))
    return table


def gib(count: float) -> str:
    """Format bytes in GiB with significant digits."""
    value = count / GIB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.4f}"


def step_table(model: DecoderConfig, parallel: ParallelConfig, job: Job, cost: LayoutCost, samples: int) -> Table:
    """Make the table of one step's work."""
    table = Table(show_header=False, title="One step", title_justify="left", box=box.SIMPLE)
    tokens = samples * job.seq_len
    table.add_row("global batch", f"{samples:,} samples × {job.seq_len:,} positions = {tokens:,} tokens")
    rows = f"{job.micro} samples" if job.row is None else f"documents, {job.row:,} positions at most"
    table.add_row("each rank", f"{job.micro_batches} micro-batches of {rows}")
    total, active = parameter_count(model), parameter_count(model, active=True)
    passed = f", of which a token passes {active:,} ({active / total:.1%})" if active < total else ""
    table.add_row("parameters", f"{total:,}{passed}")
    counts = Counter(job.policies)
    table.add_row("activations", ", ".join(f"{policy} in {count} blocks" for policy, count in counts.items()))
    table.add_row("model FLOPs", f"{cost.model_flops:.3g} (6 per parameter and token, and full attention)")
    work = [rank.flops for rank in cost.ranks]
    table.add_row("computed per rank", " / ".join(f"{flops:.3g}" for flops in distinct(cost.ranks)) + " FLOPs")
    if cost.timeline is not None:
        table.add_row("dearest pipeline rank", f"{max(work) / (sum(work) / len(work)) - 1:.1%} above the mean")
        closed = closed_form(parallel, cost.plan.count, job.micro_batches)
        even = f"; {closed:.1%} were its stages even" if closed is not None else ""
        table.add_row("pipeline bubble", f"{cost.timeline.bubble:.1%} of the ranks' time{even}")
    return table


def distinct(ranks: Sequence[RankCost]) -> list[float]:
    """Format the FLOPs of the pipeline ranks, once where all are equal."""
    work = [rank.flops for rank in ranks]
    return work[:1] if len(set(work)) == 1 else work


def closed_form(parallel: ParallelConfig, stages: int, micro_batches: int) -> float | None:
    """(p − 1) / (v·m + p − 1) of the wall time (arXiv 2104.04473), for the schedules that it is about."""
    if parallel.schedule not in ("gpipe", "1f1b", "interleaved"):
        return None
    return (parallel.pp - 1) / (stages // parallel.pp * micro_batches + parallel.pp - 1)
