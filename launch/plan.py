"""`meshloom plan`: what a run would ask of its processes, by arithmetic. Starts no process and touches no GPU.

meshloom plan recipe=llama_8b launch.nproc=8 parallel.tp=2 parallel.pp=2 --draw-pipeline pipeline.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from ..config.problems import ConfigError, Problem
from ..models.config import DECODER
from ..models.costs import ACCUM_BYTES
from ..models.protocol import Model, decoder_shape
from ..parallel.config import ParallelConfig
from ..parallel.cost import LayoutCost, layout_cost
from ..parallel.engines import engine_cost
from ..parallel.layout import Layout
from ..parallel.memory import Job
from ..parallel.offload import OffloadAccount, describe
from ..parallel.policies import block_policies, fused_swiglu_blocker
from ..trainer.build import Parts, build_model, engine_settings, optimizer_factory
from ..trainer.schema import make_composer
from ..trainer.validate import run_problems
from .checkpoint_needs import CheckpointNeeds, checkpoint_needs, describe_needs, shortages
from .host import available_memory
from .plan_drawing import pipeline_svg
from .plan_tables import gib, plan_tables
from .train import BAD_CONFIG, processes

WIDTH = 120  # columns, where no terminal says


@dataclass(frozen=True)
class Plan:
    """A run on paper.

    model    on the meta device
    away     what its first rank keeps away from its GPU
    needs    what its checkpoints take
    samples  global batch, at its start where it changes
    notes    what whoever reads the figures should know about them
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
        """Of the fullest rank, at most at once."""
        return max(rank.total for rank in self.cost.ranks)


def main(argv: Sequence[str]) -> int:
    """Print the plan of this command line's run. Returns 0, 2 for one that can't run, 1 if the drawing can't be written."""
    parser = argparse.ArgumentParser("meshloom plan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="recipe=… and key=value, as for `meshloom train`")
    parser.add_argument("--draw-pipeline", metavar="FILE.svg", type=Path, help="draw the pipeline's schedule")
    parser.add_argument("--config-dir", help="folder of further recipes")
    arguments = parser.parse_intermixed_args(list(argv))
    try:
        composition = make_composer(arguments.config_dir).compose(arguments.overrides)
        plan = plan_of(composition.config, composition.problems)
        if arguments.draw_pipeline is not None and plan.cost.timeline is None:
            fix = "set parallel.pp to 2 or more, or leave --draw-pipeline out"
            raise ConfigError([Problem("--draw-pipeline", "there is no pipeline with parallel.pp=1", fix)])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for table in plan_tables(plan.parallel, plan.layout, plan.job, plan.cost, plan.samples):
        console.print(table)
    notes = list(plan.notes)
    if spared := spared_by_fusing(plan, composition.config):
        where = "where SwiGLU is computed inside its products: Hopper GPUs, pip install 'meshloom[flash4]'"
        notes.append(f"{gib(spared)} GiB less {where}")
    for note in notes:
        console.print(f"· {note}", style="dim", highlight=False, markup=False)
    local = plan.layout.world_size // composition.config.launch.nodes
    for problem in shortages(composition.config, plan.needs, plan.away, local, available_memory()):
        console.print(f"! {problem}", style="yellow", highlight=False, markup=False)
    if arguments.draw_pipeline is not None:
        assert plan.cost.timeline is not None
        title = f"{plan.parallel.schedule} on {plan.parallel.pp} ranks, {plan.job.micro_batches} micro-batches"
        try:
            arguments.draw_pipeline.write_text(pipeline_svg(plan.cost.timeline, title), encoding="utf-8")
        except OSError as error:
            print(f"meshloom plan: {arguments.draw_pipeline}: {error.strerror}", file=sys.stderr)
            return 1
        console.print(f"drew {arguments.draw_pipeline}")
    return 0


def make_plan(overrides: Sequence[str], config_dir: str | None = None) -> Plan:
    """The plan of a run. Raises ConfigError with everything that keeps it from running.

    Data that are not on this machine do not matter here: they become a note.
    """
    composition = make_composer(config_dir).compose(overrides)
    return plan_of(composition.config, composition.problems)


def plan_of(config: DictConfig, known: Sequence[Problem] = (), *, fused: bool = False) -> Plan:
    """The plan of a composed config, whose automatic values are replaced by their numbers, in place.

    known: problems of its composition. fused: the GPUs compute SwiGLU inside its products wherever a run lets them. Raises
    ConfigError with those problems and everything else that keeps it from running.
    """
    world_size = planned_processes(config)
    found = [*known, *run_problems(config, world_size)]
    problems = [problem for problem in found if problem.key.partition(".")[0] != "data"]
    notes = [str(problem) for problem in found if problem not in problems]
    if not problems:
        problems += _unplanned(config)
    if problems:
        raise ConfigError(problems)
    parts = Parts.of(config)
    layout = Layout.plan(parts.parallel, world_size)
    vocabulary = config.model.get("vocabulary") or config.data.get("vocabulary")
    if not config.model.get("vocabulary"):
        notes.append(f"a vocabulary of {vocabulary:,} tokens, as data.vocabulary asks for; the tokenizer has the last word")
    if config.batch.name != "fixed":
        notes.append(
            f"the batch size changes during the run; these are the figures of its start, {config.batch.samples} samples"
        )
    model = build_model(config, vocabulary)
    settings = engine_settings(config)
    try:
        policies = block_policies(decoder_shape(model), parts.parallel, settings)
    except ValueError as error:
        raise ConfigError([Problem("trainer.activation_budget", str(error), "give it more")]) from error
    job = Job(
        seq_len=config.data.seq_len,
        micro=config.batch.micro,
        micro_batches=max(1, config.batch.samples // (layout.data_size * config.batch.micro)),
        precision=config.precision,
        policies=policies,
        compiled=parts.trainer.compile,
        fused=fused and fused_swiglu_blocker(decoder_shape(model), parts.parallel, settings, policies) is None,
    )
    cost, away, held = _costs(config, model, parts.parallel, layout, job)
    needs = checkpoint_needs(parts.checkpoint, layout, held)
    notes += [*describe(away), *describe_needs(needs)]
    notes += [
        "weights, gradients and optimizer state are exact; activations and working memory are estimates, and what CUDA,"
        " NCCL and the allocator take is not in them",
        *_caveats(parts.parallel),
    ]
    return Plan(model, parts.parallel, layout, job, cost, away, needs, config.batch.samples, notes)


def _costs(
    config: DictConfig, model: Model, parallel: ParallelConfig, layout: Layout, job: Job
) -> tuple[LayoutCost, OffloadAccount, list[int]]:
    """What every rank's GPU holds, and what the first rank keeps away: a pipeline offloads nothing, so others do not differ.

    And the weights and optimizer state of all of them, in bytes, wherever they are.
    """
    cost = layout_cost(model, parallel, layout, job, optimizer_factory(config))
    held = [rank.elements * ACCUM_BYTES[job.precision] + (rank.optimizer or 0) for rank in cost.ranks]
    ranks, away = zip(*(engine_cost(rank, model, parallel, layout, job) for rank in cost.ranks), strict=True)
    return replace(cost, ranks=list(ranks)), away[0], held


def spared_by_fusing(plan: Plan, config: DictConfig) -> int:
    """Bytes of the fullest rank that a plan of plain SwiGLU would not take on GPUs that compute it inside its products."""
    if fused_swiglu_blocker(decoder_shape(plan.model), plan.parallel, engine_settings(config), plan.job.policies) is not None:
        return 0
    cost, *_ = _costs(config, plan.model, plan.parallel, plan.layout, replace(plan.job, fused=True))
    return plan.bytes - replace(plan, cost=cost).bytes


def planned_processes(config: DictConfig) -> int:
    """Processes of the whole run: those of a node, times launch.nodes. 0 for a `launch.nproc` that is no number."""
    nodes = config.launch.nodes
    per_node = config.launch.gpus_per_node if config.launch.nproc == "auto" and nodes > 1 else processes(config)
    return per_node * nodes


def _unplanned(config: DictConfig) -> list[Problem]:
    """What runs, but is not known well enough to be planned."""
    problems: list[Problem] = []
    if config.model.get("_target_") != DECODER:
        problems.append(
            Problem("model", "only the costs of Meshloom's own decoder are known", "plan with a model of the recipes")
        )
    sizes: dict[str, Any] = {
        "data.seq_len": config.data.get("seq_len"),
        "batch.samples": config.batch.get("samples"),
        "batch.micro": config.batch.get("micro"),
        "model.vocabulary": config.model.get("vocabulary") or config.data.get("vocabulary"),
    }
    problems += [
        Problem(key, "is not known before the run", f"give a number as {key}=…") for key, size in sizes.items() if not size
    ]
    return problems


def _caveats(parallel: ParallelConfig) -> list[str]:
    """What this layout does not do although its name promises it."""
    if parallel.pp == 1 or parallel.zero < 2:
        return []
    whole = "gradients are reduced once, at the end of a step: through a pipeline ZeRO-2 needs what ZeRO-1 needs"
    if parallel.zero == 3:
        return [whole, "and weights are gathered once: ZeRO-3 shards them between steps only"]
    return [whole]
