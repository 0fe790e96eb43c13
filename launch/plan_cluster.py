"""Join a plan and a cluster: how many processes the cluster means, and what the run costs there. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.problems import ConfigError, Problem
from ..planner.cluster import ClusterConfig, is_cluster_word, load_cluster
from ..planner.prediction import Prediction
from ..planner.step_time import Step, matrices_of
from ..trainer.costs import run_tokens
from ..trainer.fitting import UnknownMachineError
from ..trainer.launching import planned_processes, visible_gpus
from ..trainer.machine_gpus import planned_machine
from ..trainer.resolve import ResolvedRun
from ..trainer.schema import RunConfig
from .planning import Plan

LAUNCH = ("launch.nproc", "launch.nodes", "launch.gpus_per_node")


def split_words(words: Sequence[str], config_dir: str | None = None) -> tuple[list[str], ClusterConfig | None]:
    """Split a command line into the run's words and its cluster, whose processes it has where it names none.

    Raises ConfigError for the cluster's problems.
    """
    run = [word for word in words if not is_cluster_word(word)]
    if len(run) == len(words):
        return run, None
    cluster = load_cluster([word for word in words if is_cluster_word(word)], config_dir)
    if not any(word.partition("=")[0] in LAUNCH for word in run):
        run += launch_words(cluster)
    return run, cluster


def launch_words(cluster: ClusterConfig) -> list[str]:
    """Return the overrides that start a process on each GPU of a cluster."""
    if cluster.nodes == 1:
        return [f"launch.nproc={cluster.gpus}"]
    return [f"launch.nodes={cluster.nodes}", f"launch.nproc={cluster.gpus_per_node}"]


def assumed_cluster(resolved: ResolvedRun) -> str:
    """Return a line that says which GPUs a plan without a cluster is made for, and how others are named."""
    others = f"cluster=…, for example cluster=h200x{max(1, planned_processes(resolved.config.launch))}"
    if not resolved.fitted:
        return f"no cluster is named or assumed: this is memory alone; {others}, also predicts seconds, days and cost"
    keys = " and ".join(resolved.fitted)
    try:
        machine = planned_machine(resolved.config)
    except (UnknownMachineError, ConfigError):  # a note of the plan says why
        return f"{keys} could not be fitted to this machine's GPUs; name others with {others}"
    if visible_gpus():
        return f"{keys} fitted to this machine's {machine.gpu}; name others with {others}"
    return f"assumed {machine.gpu}, to which {keys} are fitted: no GPU is here; name yours with {others}"


def refuse_too_few(config: RunConfig, cluster: ClusterConfig) -> None:
    """Raise ConfigError for a run that has more processes than the cluster has GPUs."""
    if (processes := planned_processes(config.launch)) > cluster.gpus:
        fix = f"give the cluster more, for example cluster.gpus={processes}, or start fewer processes"
        raise ConfigError([Problem("cluster.gpus", f"{cluster.gpus} GPUs for {processes} processes", fix)])


def predict(plan: Plan, config: RunConfig, cluster: ClusterConfig, length: float | None = None) -> Prediction:
    """Predict what a planned run costs on a cluster. length: mean tokens of a document that attention stays inside."""
    if plan.dealt is not None:
        length = plan.dealt.length
    step = Step(
        plan.model.shape, plan.parallel, plan.layout, plan.job, plan.cost, plan.away, cluster, length,
        matrices=matrices_of(config.optim, plan.model), saving=config.checkpoint, dealt=plan.dealt, islands=plan.islands,
    )  # fmt: skip
    return Prediction(step, plan.samples, run_tokens(config))
