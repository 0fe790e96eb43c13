"""Local updating beside a bare PyTorch loop: as many models as islands, in one process, joined by `torch.optim.SGD`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from meshloom.data.assignment import Assigner
from meshloom.data.batch import IGNORED, GlobalBatch, MicroBatch
from meshloom.models.init import fill
from support.models import decoder
from support.parity import HELD_OUT, UnevenSamples, Work, build, sample, take_steps


@dataclass(frozen=True)
class Curve:
    """Losses of an island's steps, and of an evaluation of the outer weights after them."""

    losses: list[float]
    evaluated: float


def _model(work: Work) -> torch.nn.Module:
    model = decoder(**work.llama()).double()
    for name, weight in model.named_parameters():
        shape = tuple(weight.shape)
        fill(weight.data, model.initial(name), seed=7, name=name, global_shape=shape, offsets=(0,) * len(shape))
    return model


def _loss(model: torch.nn.Module, indices: range) -> tuple[torch.Tensor, int]:
    """Mean loss over the valid tokens of some samples, and their number."""
    batch = MicroBatch.collate([sample(index) for index in indices])
    logits, targets_T = model(batch.tokens_BS, None, None).flatten(0, 1), batch.targets_BS.flatten()
    return torch.nn.functional.cross_entropy(logits, targets_T, ignore_index=IGNORED), int((targets_T != IGNORED).sum())


def _layer_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def plain_islands(work: Work) -> list[Curve]:
    """Train islands one after another, step by step. From the papers, without anything of `optim/local/`."""
    local, count = work.local, work.local.islands
    models = [_model(work) for _ in range(count)]
    inner = [_inner(work, model) for model in models]
    outer_model = _model(work)
    outer = dict(outer_model.named_parameters())
    turns: list[list[str]] = [[] for _ in range(local.fragments)]
    for name in outer:
        layer = _layer_of(name)
        turns[-1 if layer is None else layer % local.fragments].append(name)
    joins = [
        torch.optim.SGD([outer[n] for n in names], lr=local.lr, momentum=local.momentum, nesterov=local.nesterov)
        for names in turns
    ]
    learned = [[0] * count for _ in turns]
    flights: list[tuple[int, list[torch.Tensor]] | None] = [None for _ in turns]
    losses: list[list[float]] = [[] for _ in models]

    @torch.no_grad()
    def mean_difference(turn: int) -> list[torch.Tensor]:
        total = sum(learned[turn])
        held = [dict(model.named_parameters()) for model in models]
        return [
            sum((tokens / total) * (outer[name] - own[name]) for tokens, own in zip(learned[turn], held, strict=True))  # type: ignore[misc]
            for name in turns[turn]
        ]

    @torch.no_grad()
    def take_over(turn: int, mix: float) -> None:
        for model in models:
            own = dict(model.named_parameters())
            for name in turns[turn]:
                own[name].copy_(mix * own[name] + (1 - mix) * outer[name])

    def arrive(turn: int, means: Sequence[torch.Tensor]) -> None:
        for name, mean in zip(turns[turn], means, strict=True):
            outer[name].grad = mean
        joins[turn].step()
        take_over(turn, local.mix)

    for step in range(1, work.steps + 1):
        first = (step - 1) * work.samples
        for island, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            cut = [work.samples * part // count for part in (island, island + 1)]
            loss, tokens = _loss(model, range(first + cut[0], first + cut[1]))
            loss.backward()
            if work.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), work.max_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses[island].append(loss.item())
            for turn in learned:
                turn[island] += tokens
        for number in range(local.fragments):
            offset = (number + 1) * local.inner_steps // local.fragments
            last = step == work.steps
            leaves = last or step % local.inner_steps == offset % local.inner_steps
            means = mean_difference(number) if leaves else []
            flight = flights[number]
            comes = flight is not None and (last or flight[0] == step)
            if comes:
                assert flight is not None
                arrive(number, flight[1])
                flights[number] = None
            if not leaves:
                continue
            learned[number] = [0] * count
            if last or local.delay == 0:
                arrive(number, means)
                continue
            flights[number] = (step + local.delay, means)
            if local.delay == local.inner_steps and not comes:
                take_over(number, 0.0)
    with torch.no_grad():
        evaluated = _loss(outer_model, range(HELD_OUT, HELD_OUT + work.samples))[0].item()
    return [Curve(each, evaluated) for each in losses]


def _inner(work: Work, model: torch.nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [weight], "weight_decay": 0.1 if model.decays(name) else 0.0}  # type: ignore[operator]
        for name, weight in model.named_parameters()
    ]
    if work.sgd:
        return torch.optim.SGD(groups, lr=work.lr)
    return torch.optim.AdamW(groups, lr=work.lr, betas=work.betas, eps=1e-8)


def trained_islands(rank: int, world_size: int, works: Sequence[Work]) -> list[tuple[int, Curve]]:
    """Body for `run_ranks`: of each work the island of this rank, and its curve, by the trainer's own loop."""
    found: list[tuple[int, Curve]] = []
    for work in works:
        try:
            engine = build(work, world_size)
            mesh = engine.mesh  # type: ignore[attr-defined]
            done = take_steps(engine, work, range(work.steps))
            dealer = Assigner(mesh.layout.data_size)
            held_out = dealer.load(UnevenSamples(False), GlobalBatch(HELD_OUT, work.samples), work.micro, mesh.data_rank)
            evaluated = float(engine.evaluate(held_out.micro_batches).mean)
            engine.finish()
            found.append((mesh.island_number, Curve(done.losses, evaluated)))
        except Exception as error:
            error.add_note(f"in {work}")
            raise
    return found
