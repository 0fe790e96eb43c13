"""Checks of how groups of the config fit together, without PyTorch. Each relation names the keys that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..checkpoint.errors import CheckpointError
from ..checkpoint.files import HUGGING_FACE, open_files
from ..checkpoint.folder import step_of
from ..config.nodes import Custom
from ..config.problems import ConfigError, Problem
from ..data.build import build_node
from ..data.config import CachedConfig
from ..data.validation_sets import ValidationSets
from ..models.config import DecoderConfig
from ..models.mixture.balance_config import SPARSITY
from ..optim.batch.controller import Controller
from ..optim.build import build_controller, build_schedule
from ..optim.optimizers.config import CustomOptim, ScheduleFreeConfig
from ..optim.optimizers.matrix_config import MatrixOptimConfig
from ..optim.progress import BEGINNING, Progress
from ..optim.schedules.coupling import coupling_problems
from ..parallel.context.sizes import ring_problems
from ..parallel.hybrid.limits import capacity_problems, hybrid_problems
from ..parallel.layout import layout_problems
from ..parallel.legality import Work, layout_and_model_problems
from ..parallel.limits import engine_problems, float8_problems, masters_problems, measuring_problems
from ..planner.cluster import load_cluster
from .derived import build_horizon, checkpoint_folder
from .find_checkpoint import AUTO_FROM
from .local_relations import local_problems, smallest_batch_problems
from .schema import RunConfig
from .stages.record import Place


@dataclass(frozen=True)
class Start:
    """The number of processes that a run starts on, and the point that it starts from.

    world_size  number of its processes; 0: not known
    progress    of the checkpoint that it resumes from
    place       its place among its stages; None: it has none
    """

    world_size: int
    progress: Progress = BEGINNING
    place: Place | None = None


@dataclass(frozen=True)
class Relation:
    """A check of how keys fit together, skipped if one of them has a problem of its own.

    needs  keys, or groups, that it reads
    check  (config, start) → problems
    """

    needs: tuple[str, ...]
    check: Callable[[RunConfig, Start], Iterable[Problem]]


def collect_problems(group: str, check: Callable[[], Iterable[Problem]]) -> list[Problem]:
    """Return the problems that `check` finds in an object of the group. A node that can't be built is a problem too."""
    try:
        return list(check())
    except ConfigError as error:
        return error.problems
    except OSError as error:  # a key names a file that can't be looked up
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error) or type(error).__name__
        return [Problem(group, reason, f"check the keys of {group}")]
    except (ImportError, TypeError, ValueError, KeyError) as error:
        return [Problem(group, f"can't be built: {error}", f"check {group}._target_ and the keys of its node")]


def _layout(config: RunConfig, start: Start) -> Iterable[Problem]:
    if not start.world_size:
        return ()
    return layout_problems(config.parallel, start.world_size, config.islands_on(start.world_size))


def _local(config: RunConfig, _: Start) -> Iterable[Problem]:
    return local_problems(config)


def _rewinds(config: RunConfig, _: Start) -> Iterator[Problem]:
    every, memory_every = config.checkpoint.every, config.checkpoint.memory_every
    if config.trainer.on_bad_step == "rewind" and (every == 0 or (every is None and memory_every is None)):
        fix = "save (checkpoint.every), or use trainer.on_bad_step=skip"
        value = "null" if every is None else every
        yield Problem("trainer.on_bad_step", f"checkpoint.every={value} leaves nothing to go back to", fix)


def _survival(config: RunConfig, _: Start) -> Iterator[Problem]:
    """Yield a problem of a run that may go on with fewer machines, and has nothing to go on from."""
    every, memory_every = config.checkpoint.every, config.checkpoint.memory_every
    if config.launch.least_nodes < config.launch.most_nodes and (every == 0 or (every is None and memory_every is None)):
        fix = "save (checkpoint.every), or give launch.nodes as one number"
        value = "null" if every is None else every
        yield Problem("launch.nodes", f"with checkpoint.every={value} a run on other machines would begin anew", fix)


def _lost_layers(config: RunConfig, _: Start) -> Iterator[Problem]:
    """Yield problems of a wish to rebuild layers of a step that nobody has named, or of a model whose layers can't be."""
    key, resume = "checkpoint.lost_layers", config.resume
    if config.checkpoint.lost_layers == "refuse":
        return
    if resume.startswith((AUTO_FROM, HUGGING_FACE)) or step_of(resume.rstrip("/").rpartition("/")[2]) is None:
        message = f"resume={resume} names no step whose lost layers could be rebuilt"
        yield Problem(key, message, "name the step: resume=<its step-… folder>; or use refuse")
    shape = config.model.decoder()
    if shape is None:
        yield Problem(key, "the kinds of this model's layers are not known", "use refuse, and resume from a whole step")
    elif shape.mixture_layers():
        message = "experts of different layers are not alike in their order, so a mixture's layers can't be averaged"
        yield Problem(key, message, "use refuse, and resume from a whole step")


def _decoder(config: RunConfig, start: Start) -> Iterable[Problem]:
    """Yield what keeps the torch engine from running a decoder in this layout, and the nearest layouts that can."""
    shape = config.model.decoder()
    if not start.world_size or shape is None or config.parallel.engine != "torch":
        return ()
    size, islands = start.world_size, config.islands_on(start.world_size)
    if size % islands:  # as `_layout` says
        return ()
    return layout_and_model_problems(config.parallel, layout_work(config, shape), size // islands)


def layout_work(config: RunConfig, shape: DecoderConfig) -> Work:
    """Return what a layout must run, with a decoder of this shape."""
    return Work(
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        ffn_dim=shape.ffn_dim,
        vocabulary=shape.vocabulary,
        seq_len=config.data.seq_len,
        activation=config.trainer.activation,
        compile=config.trainer.compile,
        experts=shape.experts.count if shape.mixture_layers() else 0,
        recurrent=shape.experts.carried_dim > 0,
    )


def _experts(config: RunConfig, _: Start) -> Iterator[Problem]:
    """Yield what does not fit a model's mixtures of experts, and what of the balance has none to act on."""
    shape = config.model.decoder()
    experts = shape.experts if isinstance(config.model, DecoderConfig) and shape is not None and shape.experts.count else None
    yield from config.balance.model_problems(experts)
    if experts is None:
        return
    if config.parallel.engine != "torch":
        fix = "use parallel.engine=torch, or model.experts.count=0"
        yield Problem("parallel.engine", f"the {config.parallel.engine} engine can't train a mixture of experts", fix)
    if config.trainer.activation_budget is not None:
        fix = "choose trainer.activation, and leave the budget null"
        yield Problem("trainer.activation_budget", "blocks with and without experts keep different amounts", fix)
    cut = [f"parallel.{axis}={getattr(config.parallel, axis)}" for axis in ("cp", "tp") if getattr(config.parallel, axis) > 1]
    cut += [f"parallel.hdp={config.parallel.hdp}"] if config.parallel.hdp != "none" else []
    for name in SPARSITY if cut else ():
        if getattr(config.balance, name):
            text = f"it compares neighbouring tokens, which {' and '.join(cut)} may give to different ranks"
            yield Problem(f"balance.{name}", text, "use 0, or leave sequences whole")
    if experts.parts.dispatch and config.parallel.ep > 1:
        fix = "use parallel.ep=1, or leave model.experts.parts.dispatch null"
        yield Problem("model.experts.parts.dispatch", "expert parallelism has a dispatch of its own", fix)
    if experts.capacity is not None:
        tokens = experts.capacity * config.batch.micro_size * config.data.seq_len * experts.top_k / experts.count
        if tokens < 1:
            text = f"{experts.capacity:g} of a micro-batch's mean load is {tokens:.2g} tokens, less than one"
            yield Problem("model.experts.capacity", text, "raise it, or batch.micro, or use null to drop no token")


def _engine(config: RunConfig, start: Start) -> Iterable[Problem]:
    size = start.world_size
    return engine_problems(config.parallel, precision=config.precision, world_size=size) if size else ()


def _exchange(config: RunConfig, _: Start) -> Iterator[Problem]:
    """Yield a problem where nobody reads the way of gradients and whole matrices."""
    parallel, moves_matrices = config.parallel, isinstance(config.optim, MatrixOptimConfig | CustomOptim)
    if parallel.gradient_exchange == "auto" or parallel.exchanges_rows or (parallel.engine == "torch" and moves_matrices):
        return
    message = "only the torch engine reads it: ZeRO-1 without pipelines and offloading, and optimizers of whole matrices"
    yield Problem("parallel.gradient_exchange", message, "leave it auto, or use parallel.zero=1")


def _float8(config: RunConfig, _: Start) -> Iterable[Problem]:
    return float8_problems(config.trainer.float8, config.parallel, config.precision) if config.trainer.float8 != "none" else ()


def _hybrid(config: RunConfig, start: Start) -> Iterator[Problem]:
    """Yield what does not fit hybrid data parallelism."""
    parallel, balance = config.parallel, config.balance
    if parallel.hdp == "none":
        return
    yield from hybrid_problems(
        parallel,
        masked=config.data.document_mask if isinstance(config.data, CachedConfig) else None,
        halves=config.optim.compares_halves(),
        cut_losses=[f"balance.{name}" for name in balance.counted_in_parts],
        drops_tokens=config.model.drops_tokens,
        float8=config.trainer.float8,
        keeps_all=config.trainer.activation == "none" and config.trainer.activation_budget is None,
    )
    if parallel.hdp_costs is not None:
        try:
            load_cluster([f"cluster={parallel.hdp_costs}"])
        except ConfigError as error:
            yield from (Problem("parallel.hdp_costs", each.message, each.fix) for each in error.problems)
    model = parallel.pp * parallel.cp * parallel.tp
    if start.world_size and not start.world_size % model:
        data_size = start.world_size // model
        yield from capacity_problems(parallel, config.batch.micro_size, config.data.seq_len, data_size)
        yield from ring_problems(parallel, data_size)


def _folder(config: RunConfig, _: Start) -> Iterator[Problem]:
    try:
        open_files(checkpoint_folder(config))
    except CheckpointError as error:
        yield Problem("checkpoint.folder", str(error), "give a path, or a URL whose fsspec library is installed")


def _stages(config: RunConfig, start: Start) -> Iterator[Problem]:
    if start.place is not None and config.checkpoint.every == 0:
        message = "0 saves nothing, and each stage begins from the checkpoint of the one before it"
        yield Problem("checkpoint.every", message, "use null to save at the end of each stage only")


def _schedule(config: RunConfig, start: Start) -> Iterable[Problem]:
    if isinstance(config.schedule, Custom):  # which may need PyTorch
        return ()
    horizon = build_horizon(config, config.data.seq_len, start.progress, start.place)
    return build_schedule(config.schedule, config.optim.lr, horizon).problems()


def _batch(config: RunConfig, start: Start) -> Iterable[Problem]:
    if isinstance(config.batch, Custom):  # which may need PyTorch
        return ()
    return batch_problems(config, start.place)


def batch_problems(config: RunConfig, place: Place | None = None) -> list[Problem]:
    """Return what keeps the batch-size controller from deciding in this run, and the optimizer from comparing halves."""
    horizon = build_horizon(config, config.data.seq_len, place=place, group="batch")
    controller = build_controller(config.batch, horizon)
    found = [*controller.problems(), *smallest_batch_problems(config, controller.least)]
    if controller.needs_statistics:
        if controller.least <= controller.micro:
            message = "a batch of one micro-batch has nothing to compare, so its noise would never be measured"
            found.append(Problem("batch.samples", message, "double it, or halve batch.micro"))
        found += measuring_problems(config.parallel, config.model.shares_weights, controller.needs_projections)
        if isinstance(config.model, DecoderConfig) and config.model.experts.count:
            for key, axis in (("tp", "tensor"), ("ep", "expert")):
                if getattr(config.parallel, key) > 1:
                    fix = f"use parallel.{key}=1, or batch=fixed, stages, ramp or critical_loss"
                    found.append(Problem("batch", f"gradients of experts can't be measured under {axis} parallelism", fix))
            if config.model.experts.carried_dim and config.parallel.pp > 1:
                fix = "use parallel.pp=1, or batch=fixed, stages, ramp or critical_loss"
                text = "the gradient of what recurrent routers share can't be measured in a pipeline"
                found.append(Problem("batch", text, fix))
    if config.optim.compares_halves():
        found += _halves_problems(config, controller)
    return found


def _halves_problems(config: RunConfig, controller: Controller) -> list[Problem]:
    """Return the problems that keep AGVM from comparing two halves of every batch."""
    found: list[Problem] = []
    if config.parallel.engine != "torch":
        fix = "use parallel.engine=torch, or another optimizer"
        found.append(Problem("optim", "AGVM compares halves of a batch's gradient, which DeepSpeed does not give", fix))
    if config.parallel.pp > 1:
        fix = "use parallel.pp=1, or another optimizer"
        found.append(Problem("optim", "AGVM compares halves of a batch's micro-batches, which a pipeline mixes", fix))
    if controller.least <= controller.micro:
        fix = "halve batch.micro, or double the smallest batch"
        found.append(Problem("batch.micro", "AGVM needs two micro-batches or more in every batch", fix))
    return found


def data_problems(config: RunConfig, _: Start) -> Iterable[Problem]:
    """Return the problems of the data node's keys and files."""
    if isinstance(config.data, Custom):  # which may need PyTorch
        return ()
    return collect_problems("data", lambda: build_node(config.data, config.seed, config.model.vocabulary).problems())


def validation_problems(config: RunConfig, _: Start) -> Iterable[Problem]:
    """Return the problems of the named validation sets: of their keys and files, as far as no data are read."""
    return collect_problems("validation", lambda: ValidationSets(config.validation, config.data, config.seed).problems())


def _masters(config: RunConfig, start: Start) -> Iterable[Problem]:
    if config.trainer.masters != "full":
        yield from masters_problems(config.parallel, config.precision, start.world_size)
        if isinstance(config.optim, ScheduleFreeConfig):
            message = "schedule_free keeps averages in fp32, and bf16 weights beside them would save nothing"
            yield Problem("trainer.masters", message, "use trainer.masters=full, or another optimizer")
        if config.optim.local.active:
            message = "islands exchange their masters, which would exist only during an update"
            yield Problem("trainer.masters", message, "use trainer.masters=full, or optim.local.islands=1")


def _averaged_weights(config: RunConfig, _: Start) -> Iterable[Problem]:
    schedule = config.schedule
    if not isinstance(config.optim, ScheduleFreeConfig) or isinstance(schedule, Custom) or schedule.name == "constant":
        return
    message = f"{schedule.name} lowers the rate, in the place of which optim=schedule_free averages weights"
    yield Problem("schedule", message, "use schedule=constant, or another optimizer")


def _coupling(config: RunConfig, _: Start) -> Iterable[Problem]:
    measures = config.batch.MEASURES or config.batch.name == "critical_loss"
    return coupling_problems(config.optim.lr_coupling, measures, config.schedule.name)


def _synthetic(config: RunConfig, _: Start) -> Iterator[Problem]:
    known, used = config.model.vocabulary, config.data.known_vocabulary
    if config.data.name == "synthetic" and known is not None and used is not None and known < used:
        message = f"the model knows {known} tokens, and the data has {used}"
        yield Problem("model.vocabulary", message, f"use {used} or more, or null for the data's own")


LENGTH = ("trainer.steps", "trainer.tokens", "data.seq_len", "batch.samples")

RELATIONS = (
    Relation(("parallel", "optim.local.islands"), _layout),
    Relation(("optim.local.islands", "optim.name", "parallel", "model", "batch", "trainer", "stages"), _local),
    Relation(("trainer.on_bad_step", "checkpoint.every", "checkpoint.memory_every"), _rewinds),
    Relation(("launch.nodes", "checkpoint.every", "checkpoint.memory_every"), _survival),
    Relation(("checkpoint.lost_layers", "resume", "model"), _lost_layers),
    Relation(("parallel", "optim.local.islands", "model", "data.seq_len", "trainer.activation", "trainer.compile"), _decoder),
    Relation(("model", "balance", "parallel", "trainer", "batch.micro", "data.seq_len"), _experts),
    Relation(("parallel", "precision"), _engine),
    Relation(("parallel", "optim"), _exchange),
    Relation(("parallel", "precision", "trainer.float8"), _float8),
    Relation(("parallel", "model", "data", "batch", "optim", "balance", "trainer.float8"), _hybrid),
    Relation(("checkpoint.folder", "output_dir"), _folder),
    Relation(("checkpoint.every",), _stages),
    Relation(("schedule", "optim.lr", *LENGTH), _schedule),
    Relation(("batch", "optim", "parallel", "model", *LENGTH), _batch),
    Relation(("data", "model.vocabulary", "seed"), data_problems),
    Relation(("validation", "data", "seed"), validation_problems),
    Relation(("parallel", "precision", "optim", "trainer.masters"), _masters),
    Relation(("optim", "schedule"), _averaged_weights),
    Relation(("optim.lr_coupling", "batch", "schedule"), _coupling),
    Relation(("model.vocabulary", "data.vocabulary"), _synthetic),
)
