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
    """Train islands one after another, step by step. From the papers, without anything of `optim/local/`.

    What an island has learned and not sent is the sum of its steps' changes. Where an island takes over a mean after a part of
    a round (Streaming DiLoCo), it is what then still lies between the outer weights and its own.
    """
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
    unsent = [{name: torch.zeros_like(weight) for name, weight in outer.items()} for _ in models]
    tokens = [[0] * count for _ in turns]
    flights: list[tuple[int, dict[str, torch.Tensor]] | None] = [None for _ in turns]
    losses: list[list[float]] = [[] for _ in models]

    @torch.no_grad()
    def send(turn: int) -> dict[str, torch.Tensor]:
        shares = [each / sum(tokens[turn]) for each in tokens[turn]]
        tokens[turn] = [0] * count
        mean = {name: torch.zeros_like(outer[name]) for name in turns[turn]}
        for share, held in zip(shares, unsent, strict=True):
            for name in turns[turn]:
                mean[name] += share * held[name]
                held[name] = torch.zeros_like(held[name])
        return mean

    @torch.no_grad()
    def take_over(turn: int) -> None:
        for model, held in zip(models, unsent, strict=True):
            own = dict(model.named_parameters())
            for name in turns[turn]:
                own[name].copy_(local.mix * own[name] + (1 - local.mix) * outer[name])
                if local.delay < local.inner_steps:
                    held[name] = outer[name] - own[name]

    def arrive(turn: int, mean: dict[str, torch.Tensor]) -> None:
        for name, each in mean.items():
            outer[name].grad = each
        joins[turn].step()
        take_over(turn)

    def close_round(turn: int, step: int, last: bool) -> None:
        flight = flights[turn]
        if flight is not None and (last or flight[0] == step):
            arrive(turn, flight[1])
            flights[turn] = None
        offset = (turn + 1) * local.inner_steps // local.fragments
        if last or step % local.inner_steps == offset % local.inner_steps:
            mean = send(turn)
            if last or local.delay == 0:
                arrive(turn, mean)
                return
            flights[turn] = (step + local.delay, mean)
            if local.delay == local.inner_steps:  # CO2: a round begins at the outer weights
                take_over(turn)

    for step in range(1, work.steps + 1):
        first = (step - 1) * work.samples
        for island, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            cut = [work.samples * part // count for part in (island, island + 1)]
            loss, learned = _loss(model, range(first + cut[0], first + cut[1]))
            loss.backward()
            if work.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), work.max_norm)
            before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            losses[island].append(loss.item())
            for name, weight in model.named_parameters():
                unsent[island][name] = unsent[island][name] + before[name] - weight.detach()
            for turn in tokens:
                turn[island] += learned
        for number in range(local.fragments):
            close_round(number, step, last=step == work.steps)
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
