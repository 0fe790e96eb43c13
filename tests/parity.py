"""The backbone of the tests: train a tiny float64 model on some layout, and compare with one process.

result = train(ParallelConfig(zero=2), steps=10)      # inside run_ranks
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from meshloom.config.parallel import ParallelConfig
from meshloom.data.batch import IGNORED, GlobalBatch, MicroBatch, Sample, deal
from meshloom.models.llama import Llama
from meshloom.optim.adamw import AdamW
from meshloom.optim.parameters import NamedParameter, Shards
from meshloom.parallel.engine import Engine
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh

VOCABULARY, SEQ_LEN = 61, 16


@dataclass(frozen=True)
class Work:
    """What is trained: everything that a run's losses may depend on, and `parallel`, on which they may not."""

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
    model: tuple[tuple[str, Any], ...] = ()

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
    mesh = Mesh.connect(Layout.plan(work.parallel, world_size), torch.device("cpu"))

    def optimizer(parameters: list[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
        return AdamW(parameters=parameters, shards=shards, lr=work.lr, weight_decay=0.1, betas=work.betas, eps=1e-8)

    with torch.device("meta"):
        model = Llama(**work.llama())
    return make_engine(
        model,
        mesh,
        optimizer,
        seed=7,
        precision=work.precision,
        activation=work.activation,
        parallel=work.parallel,
        measures=measures,
    )


def step(engine: Engine, work: Work, number: int) -> tuple[float, float]:
    """One step on the samples that this step number has in every layout: (loss, gradient norm)."""
    mesh = engine.mesh
    shares = deal(GlobalBatch(number * work.samples, work.samples), mesh.data_rank, mesh.layout.data_size, work.micro)
    batches = [MicroBatch.collate([sample(index, work.documents) for index in indices]) for indices in shares]
    valid = torch.tensor(float(sum(batch.valid_tokens for batch in batches)), dtype=torch.float64)
    model_ranks = mesh.layout.pp * mesh.layout.cp * mesh.layout.tp
    loss = engine.accumulate(batches, mesh.sum(valid) / model_ranks)
    norm = engine.gradient_norm()
    if work.max_norm is not None:
        engine.clip(work.max_norm, norm)
    engine.update(work.lr)
    engine.zero_grad()
    return float(loss.mean), float(norm)


def train(work: Work, world_size: int) -> tuple[Engine, list[float], list[float]]:
    """Train; returns the engine, the losses and the gradient norms."""
    engine = build(work, world_size)
    curve = [step(engine, work, number) for number in range(work.first_step, work.first_step + work.steps)]
    return engine, [loss for loss, _ in curve], [norm for _, norm in curve]


def curves(rank: int, world_size: int, work: Work) -> tuple[list[float], list[float]]:
    """Body for `run_ranks`: losses and norms."""
    _, losses, norms = train(work, world_size)
    return losses, norms


def plain_curve(work: Work) -> tuple[list[float], list[float]]:
    """The oracle: the same model in a bare PyTorch loop on whole batches: no engine, no sharding, no accumulation.

    The loss is `F.cross_entropy` over whole logits, the optimizer and the clipping are PyTorch's own.
    """
    from meshloom.models.init import fill

    model = Llama(**work.llama()).double()
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        fill(parameter.data, model.initial(name), seed=7, name=name, global_shape=shape, offsets=(0,) * len(shape))
    groups = [
        {"params": [p], "weight_decay": 0.1 if model.decays(n) else 0.0, "lr": work.lr * model.lr_scale(n)}
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=work.betas, eps=1e-8)
    losses: list[float] = []
    norms: list[float] = []
    for number in range(work.first_step, work.first_step + work.steps):
        indices = range(number * work.samples, (number + 1) * work.samples)
        batch = MicroBatch.collate([sample(index, work.documents) for index in indices])
        logits = model(batch.tokens_BS, None, batch.documents_BS)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), ignore_index=IGNORED)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), work.max_norm or torch.inf)))
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def gradients(rank: int, world_size: int, work: Work) -> dict[str, tuple[Any, torch.Tensor]]:
    """Body for `run_ranks`: this rank's boxes of the first step's gradient, read as Adam's first moment with betas of 0."""
    engine = build(work, world_size)
    step(engine, work, 0)
    return {
        f"{fragment.name} {fragment.box.offsets}": ((fragment.global_shape, fragment.box), fragment.tensor.clone())
        for fragment in engine.fragments()
        if fragment.role == "exp_avg"
    }
