"""The backbone of the tests: train a tiny float64 model on some layout, and compare with a bare PyTorch loop in one process.

The model is trained by the trainer's own `Loop`, so that what the loop counts and scales is held to the bare one, too.

(found,) = differences(4, [Work(ParallelConfig(zero=2, tp=2))])
assert found.worst < 1e-9
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meshloom.config.duration import Duration, Unit
from meshloom.data.assignment import Assigner, Dealer, Share
from meshloom.data.batch import IGNORED, GlobalBatch, MicroBatch, Sample
from meshloom.data.loader import Loader
from meshloom.data.samples.left_out import LeftOut
from meshloom.models.mixture.balance_config import BalanceConfig
from meshloom.optim.batch.config import FixedConfig
from meshloom.optim.batch.controller import Fixed
from meshloom.optim.horizon import Horizon
from meshloom.optim.local.config import SYNCHRONOUS, LocalConfig
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.optim.optimizers.parameters import NamedParameter, Shards, decay_groups
from meshloom.optim.progress import Progress
from meshloom.optim.schedules.config import ScheduleConfig
from meshloom.optim.schedules.coupling import Coupling
from meshloom.optim.schedules.schedule import Constant
from meshloom.parallel.box import Box
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import Engine
from meshloom.parallel.engines import make_engine
from meshloom.parallel.hybrid.cost import CostModel
from meshloom.parallel.hybrid.hidden_copies import HiddenCopies
from meshloom.parallel.hybrid.share import HybridAssigner
from meshloom.parallel.layout import Layout, island_count
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline.stages import legal_micro_batches
from meshloom.trainer.config import TrainerConfig
from meshloom.trainer.guard.guard import StepGuard
from meshloom.trainer.guard.journal import Journal
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.loop import Loop
from meshloom.trainer.signals import StopRequest
from support.experts import PlainBalance
from support.models import decoder
from support.ranks import run_ranks
from support.settings import settings_of

VOCABULARY, SEQ_LEN = 61, 16


@dataclass(frozen=True)
class Work:
    """One training run: everything that its losses may depend on, and `parallel`, on which they may not."""

    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(zero=0))
    micro: int = 1
    samples: int = 8
    steps: int = 10
    first_step: int = 0
    documents: bool = False
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    max_norm: float | None = 0.5
    precision: str = "fp64"
    activation: str = "none"
    compile: bool = False
    halves: bool = False
    model: tuple[tuple[str, Any], ...] = ()
    balance: tuple[tuple[str, Any], ...] = ()
    local: LocalConfig = SYNCHRONOUS
    sgd: bool = False
    hidden: HiddenCopies | None = None

    def llama(self) -> dict[str, Any]:
        """The model's shape: sizes that divide by none of the rank counts, so that shards are uneven."""
        shape = {"dim": 24, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 36, "vocabulary": VOCABULARY}
        return {**shape, **dict(self.model)}


def sample(index: int, documents: bool = False) -> Sample:
    """A sample with a different number of valid targets each, so that a mean of means shows."""
    draw = np.random.default_rng(index)
    tokens = draw.integers(0, VOCABULARY, SEQ_LEN + 1)
    targets = tokens[1:].copy()
    targets[: index % 7] = IGNORED
    borders = np.cumsum(draw.random(SEQ_LEN) < 0.15) if documents else None
    return Sample(tokens[:-1], targets, borders)


def build(work: Work, world_size: int, measures: bool = False) -> Engine:
    """An engine for this process of a run over `world_size`."""
    islands = island_count(work.local, work.parallel, world_size)
    mesh = Mesh.connect(Layout.plan(work.parallel, world_size, islands), torch.device("cpu")).island

    def optimizer(parameters: list[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
        if work.sgd:
            return torch.optim.SGD(decay_groups(parameters, 0.1), lr=work.lr)
        return AdamW(AdamWConfig(lr=work.lr, weight_decay=0.1, betas=list(work.betas), eps=1e-8), parameters, shards)

    with torch.device("meta"):
        model = decoder(**work.llama())
    settings = settings_of(
        model,
        work.parallel,
        work.activation,
        precision=work.precision,
        compile=work.compile,
        seed=7,
        measures=measures,
        balance=BalanceConfig(**dict(work.balance)),
        local=work.local,
        hidden_copies=work.hidden,
    )
    return make_engine(model, mesh, optimizer, work.parallel, settings)


class UnevenSamples:
    """`sample` as the trainer's loader reads it. Implements `Samples`."""

    seq_len, vocabulary = SEQ_LEN, VOCABULARY

    def __init__(self, documents: bool) -> None:
        self._documents = documents

    def __getitem__(self, index: int) -> Sample:
        return sample(index, self._documents)


def assigner(mesh: Mesh, work: Work) -> Assigner:
    """Return the assigner that deals the work's batches."""
    can_run = functools.partial(legal_micro_batches, work.parallel)
    islands = 1 if mesh.across is None else mesh.across.size()
    return Assigner(mesh.layout.data_size, can_run, work.halves, islands, mesh.island_number)


def dealer(mesh: Mesh, work: Work) -> Dealer:
    """Return what deals the work's batches: samples, or under hybrid data parallelism their documents."""
    if work.parallel.hdp == "none":
        return assigner(mesh, work)
    measured = None if work.parallel.hdp_costs is None else CostModel(1.0, 5.0, row=9.0)
    return HybridAssigner.of(work.parallel, mesh.layout, work.micro * SEQ_LEN, CostModel(10.0, 100.0), measured=measured)


def share(mesh: Mesh, work: Work, first: int, *, by_worker: bool = False) -> Share:
    """This rank's share of the global batch that begins with a sample. by_worker: as steps are dealt that are measured."""
    batch = GlobalBatch(first, work.samples)
    samples = UnevenSamples(work.documents)
    return dealer(mesh, work).load(samples, batch, work.micro, mesh.data_rank, by_worker=by_worker)


def global_tokens(mesh: Mesh, share: Share) -> torch.Tensor:
    """Valid positions of the whole global batch."""
    model_ranks = mesh.layout.pp * mesh.layout.cp * mesh.layout.tp
    return mesh.sum(torch.tensor(float(share.valid_tokens), dtype=torch.float64)) / model_ranks


def equal_share(batches: Sequence[MicroBatch], ranks: int = 1) -> Share:
    """A share of micro-batches made by hand, where every rank has as many."""
    return Share(batches, passes=len(batches), workers=len(batches) * ranks)


class Recorder(Hook):
    """Keeps the loss and the gradient norm of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.joint_losses: list[float] = []  # of all islands

    def on_metrics(self, loop: Loop, row: dict[str, Any]) -> None:
        self.joint_losses += [row["islands/loss"]] if "islands/loss" in row else []
        self.losses.append(row["loss"])
        self.norms.append(row["grad_norm"])


def take_steps(engine: Engine, work: Work, numbers: range, *hooks: Hook) -> Recorder:
    """Take the steps of these numbers with the trainer's own loop, loader, clipping and schedule."""
    mesh, recorder = engine.mesh, Recorder()
    horizon = Horizon(Duration(numbers.stop, Unit.STEPS), SEQ_LEN, work.samples)
    loader = Loader(UnevenSamples(work.documents), dealer(mesh, work), mesh.data_rank)
    done = numbers.start * work.samples
    loop = Loop(
        mesh=mesh,
        engine=engine,
        batches=loader,
        controller=Fixed(FixedConfig(samples=work.samples, micro=work.micro), horizon),
        schedule=Constant(ScheduleConfig(warmup=0), work.lr, horizon),
        coupling=Coupling("none"),
        horizon=horizon,
        flops_per_token=0.0,
        output_dir=Path(),
        max_grad_norm=work.max_norm,
        hooks=[recorder, *hooks],
        progress=Progress(numbers.start, done, done * SEQ_LEN, work.samples),
    )
    try:
        loop.run(StopRequest())
    finally:
        loader.close()
    return recorder


def step(engine: Engine, work: Work, number: int) -> tuple[float, float]:
    """One step on the samples that this step number has in every layout: (loss, gradient norm)."""
    done = take_steps(engine, work, range(number, number + 1))
    return done.losses[0], done.norms[0]


def train(work: Work, world_size: int) -> tuple[Engine, list[float], list[float]]:
    """Train; returns the engine, the losses and the gradient norms."""
    engine = build(work, world_size)
    done = take_steps(engine, work, _steps(work))
    return engine, done.losses, done.norms


def _steps(work: Work) -> range:
    return range(work.first_step, work.first_step + work.steps)


def curves(rank: int, world_size: int, work: Work) -> tuple[list[float], list[float]]:
    """Body for `run_ranks`: losses and norms."""
    _, losses, norms = train(work, world_size)
    return losses, norms


@dataclass(frozen=True)
class Run:
    """Losses and norms of every step, and by parameter the boxes of Adam's first moment after the first of them.

    That is the first step's clipped gradient times one minus the first beta. The last loss is that of an evaluation.
    """

    losses: list[float]
    norms: list[float]
    moments: list[tuple[str, Box, torch.Tensor]]


def plain_run(work: Work) -> Run:
    """The oracle: the same model in a bare PyTorch loop on whole batches: no engine, no sharding, no accumulation.

    The loss is `F.cross_entropy` over whole logits, the optimizer and the clipping are PyTorch's own.
    """
    same = replace(work, parallel=ParallelConfig(), activation="none", compile=False, halves=False, precision="fp64")
    if not BalanceConfig(**dict(work.balance)).depends_on_micro_batches:
        same = replace(same, micro=1)
    if repr(same) not in _known:
        _known[repr(same)] = _plain_run(same)
    return _known[repr(same)]


HELD_OUT = 10_000  # the first sample of evaluations
_known: dict[str, Run] = {}


def _plain_run(work: Work) -> Run:
    from meshloom.models.init import fill

    model = decoder(**work.llama()).double()
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        fill(parameter.data, model.initial(name), seed=7, name=name, global_shape=shape, offsets=(0,) * len(shape))
    groups = [
        {"params": [p], "weight_decay": 0.1 if model.decays(n) else 0.0, "lr": work.lr * model.lr_scale(n)}
        for n, p in model.named_parameters()
    ]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, betas=work.betas, eps=1e-8)
    if work.sgd:
        optimizer = torch.optim.SGD(groups)
    run = Run([], [], [])
    balance = PlainBalance(model, BalanceConfig(**dict(work.balance)), work.micro)

    def losses_from(first: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = MicroBatch.collate([sample(index, work.documents) for index in range(first, first + work.samples)])
        logits = model(batch.tokens_BS, None, batch.documents)
        targets_T = batch.targets_BS.flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_T, ignore_index=IGNORED)
        log_sums_T = logits.flatten(0, 1)[targets_T != IGNORED].logsumexp(-1)
        return loss, model.config.z_loss * log_sums_T.square().mean() + balance.loss(batch.targets_BS != IGNORED)

    for number in _steps(work):
        loss, z_loss = losses_from(number * work.samples)
        (loss + z_loss).backward()
        run.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), work.max_norm or torch.inf)))
        run.losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        balance.end_step()
        if number == work.first_step and not work.sgd:
            for name, parameter in model.named_parameters():
                run.moments.append((name, Box.whole(parameter.shape), optimizer.state[parameter]["exp_avg"].clone()))
    run.losses.append(losses_from(HELD_OUT)[0].item())
    return run


def plain_curve(work: Work) -> tuple[list[float], list[float]]:
    """Losses and norms of `plain_run`."""
    run = plain_run(work)
    return run.losses[:-1], run.norms


class Guarded(Hook):
    """Gives the loop a guard, and the samples of its journal to leave out."""

    def __init__(self, folder: Path | str = "", **keys: object) -> None:
        self._folder, self._config = Path(folder), TrainerConfig(steps=1, **keys)  # type: ignore[arg-type]
        self.guard: StepGuard | None = None

    def on_run_begin(self, loop: Loop) -> None:
        journal = Journal("data of the tests")
        self.guard = loop.guard = StepGuard(loop.mesh, self._config, journal, str(self._folder), self._folder)
        loop.batches.samples = LeftOut(loop.batches.samples, journal.is_left_out)


class FirstMoments(Hook):
    """Keeps this rank's boxes of Adam's first moment after the first of the steps."""

    def __init__(self) -> None:
        self.boxes: list[tuple[str, Box, torch.Tensor]] = []

    def on_step_end(self, loop: Loop) -> None:
        if not self.boxes:
            held = (fragment for fragment in loop.engine.fragments() if fragment.role == "exp_avg")
            self.boxes = [(each.name, each.box, each.tensor.clone()) for each in held]


def runs(rank: int, world_size: int, works: Sequence[Work]) -> list[Run]:
    """Body for `run_ranks`: this rank's part of each run. Works share their processes, which saves starting them."""
    found: list[Run] = []
    for work in works:
        try:
            engine = build(work, world_size)
            moments = FirstMoments()
            done = take_steps(engine, work, _steps(work), moments, Guarded())
            evaluated = float(engine.evaluate(share(engine.mesh, work, HELD_OUT).micro_batches).mean)
            found.append(Run([*done.losses, evaluated], done.norms, moments.boxes))
        except Exception as error:
            error.add_note(f"in {work}")
            raise
    return found


@dataclass(frozen=True)
class Difference:
    """Largest relative differences from the bare loop, over steps and ranks.

    loss: of steps and of an evaluation after them
    gradient: of the first step, over parameters, each relative to its largest element
    """

    loss: float
    norm: float
    gradient: float

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max(self.loss, self.norm, self.gradient)


Body = Callable[[int, int, Sequence[Work]], list[Run]]


def differences(ranks: int, works: Sequence[Work], timeout: float = 150.0, body: Body = runs) -> list[Difference]:
    """Measure how far these works, on this many processes, are from the bare loop. Every element must be on some rank."""
    expected = [plain_run(work) for work in works]
    results = run_ranks(ranks, body, works, timeout=timeout)
    return [_difference(oracle, [rank[at] for rank in results]) for at, oracle in enumerate(expected)]


def _difference(oracle: Run, found: Sequence[Run]) -> Difference:
    whole = {name: tensor for name, _, tensor in oracle.moments}
    missing = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in whole.items()}

    def relative(got: list[float], want: list[float]) -> Iterator[float]:
        return (abs(one - other) / abs(other) for one, other in zip(got, want, strict=True))

    gradient = 0.0
    for run in found:
        for name, box, tensor in run.moments:
            expected = whole[name]
            gradient = max(gradient, float((tensor - expected[box.slices()]).abs().max() / expected.abs().max()))
            missing[name][box.slices()] = False
    assert not any(bool(where.any()) for where in missing.values()), "the ranks' boxes cover every parameter"
    losses = max(difference for run in found for difference in relative(run.losses, oracle.losses))
    norms = max(difference for run in found for difference in relative(run.norms, oracle.norms))
    return Difference(losses, norms, gradient)
