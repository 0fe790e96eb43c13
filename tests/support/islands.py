"""Local updating beside a bare PyTorch loop: as many models as islands, in one process, joined by `torch.optim.SGD`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from meshloom.data.assignment import Assigner
from meshloom.data.batch import IGNORED, GlobalBatch, MicroBatch
from meshloom.models.init import fill
from meshloom.parallel.torch.islands import ISLAND_WEIGHT
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.loop import Loop
from support.models import decoder
from support.parity import HELD_OUT, UnevenSamples, Work, build, sample, take_steps


@dataclass(frozen=True)
class Curve:
    """Losses of an island's steps, of an evaluation of the outer weights after them, and of all islands where they meet."""

    losses: list[float]
    evaluated: float
    joint_losses: list[float] = field(default_factory=list[float])


@dataclass
class Sent:
    """Differences that islands have sent of a turn's weights, and the tokens each learned from. due: when they are used"""

    due: int
    tokens: list[int]
    differences: list[dict[str, torch.Tensor]]

    def aggregated(self, aggregate: str) -> dict[str, torch.Tensor]:
        """Return the mean difference, by tokens, or the geometric median."""
        names = self.differences[0]
        shares = [each / max(1, sum(self.tokens)) for each in self.tokens]
        if aggregate == "geometric_median":
            rows = np.stack([torch.cat([each[name].flatten() for name in names]).numpy() for each in self.differences])
            flat = torch.from_numpy(geometric_median(rows, np.array(shares)))
            pieces = flat.split([each.numel() for each in names.values()])
            return {name: piece.view_as(each) for (name, each), piece in zip(names.items(), pieces, strict=True)}
        return {name: sum(s * d[name] for s, d in zip(shares, self.differences, strict=True)) for name in names}  # type: ignore[misc]


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


def geometric_median(rows: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the point of the least weighted sum of distances to whole rows, by Newton's method. For a point that is no row."""
    z = np.median(rows, axis=0)
    for _ in range(100):
        from_z = rows - z
        distances = np.linalg.norm(from_z, axis=1)
        units, pulls = from_z / distances[:, None], shares / distances
        # The Hessian is Σ pulls (1 − u uᵀ), which is inverted in the space of the u (Woodbury).
        inner = np.linalg.inv(np.diag(1 / pulls) - units @ units.T / pulls.sum())
        slope = shares @ units
        step = slope / pulls.sum() + units.T @ (inner @ (units @ slope)) / pulls.sum() ** 2
        while (shares * np.linalg.norm(rows - z - step, axis=1)).sum() > (shares * distances).sum() * (1 + 1e-15):
            step /= 2
        z = z + step
    return z


@dataclass(frozen=True)
class Spoilt:
    """An island multiplies its weights by a factor, before the update of a step (counted from 1)."""

    island: int
    step: int
    factor: float


def plain_islands(work: Work, present: Mapping[int, int] | None = None, spoilt: Spoilt | None = None) -> list[Curve]:
    """Train islands one after another, step by step. From the papers, without anything of `optim/local/`.

    present: step (counted from 1) → islands from there on. The last ones are lost, and with them what they have not sent, or
    what is under way of theirs. One that comes begins at the outer weights, with the first one's optimizer state.

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
    flights: list[Sent | None] = [None for _ in turns]
    losses: list[list[float]] = [[] for _ in models]
    joint_losses: list[float] = []  # of all islands, in the rounds of the first turn
    since: list[tuple[float, int]] = []  # sums of token losses and their numbers, in this round

    @torch.no_grad()
    def send(turn: int, due: int) -> Sent:
        if turn == 0:
            joint_losses.append(sum(each for each, _ in since) / sum(count for _, count in since))
            since.clear()
        sent = Sent(due, tokens[turn], [{name: held[name] for name in turns[turn]} for held in unsent])
        tokens[turn] = [0] * len(models)
        for held in unsent:
            held.update({name: torch.zeros_like(held[name]) for name in turns[turn]})
        return sent

    def change_to(now: int) -> None:
        del models[now:], inner[now:], unsent[now:]
        for sent in flights:
            if sent is not None:
                del sent.tokens[now:], sent.differences[now:]
        while len(models) < now:
            models.append(copy.deepcopy(outer_model))
            inner.append(_inner(work, models[-1]))
            inner[-1].load_state_dict(copy.deepcopy(inner[0].state_dict()))
            unsent.append({name: torch.zeros_like(weight) for name, weight in outer.items()})
            losses.append([])
        for each in tokens:
            each[now:] = [0] * (now - len(each))

    @torch.no_grad()
    def take_over(turn: int) -> None:
        for model, held in zip(models, unsent, strict=True):
            own = dict(model.named_parameters())
            for name in turns[turn]:
                own[name].copy_(local.mix * own[name] + (1 - local.mix) * outer[name])
                if local.delay < local.inner_steps:
                    held[name] = outer[name] - own[name]

    def arrive(turn: int, sent: Sent) -> None:
        for name, each in sent.aggregated(local.aggregate).items():
            outer[name].grad = each
        joins[turn].step()
        take_over(turn)

    def close_round(turn: int, step: int, last: bool) -> None:
        flight = flights[turn]
        if flight is not None and (last or flight.due == step):
            arrive(turn, flight)
            flights[turn] = None
        offset = (turn + 1) * local.inner_steps // local.fragments
        if last or step % local.inner_steps == offset % local.inner_steps:
            sent = send(turn, step + local.delay)
            if last or local.delay == 0:
                arrive(turn, sent)
                return
            flights[turn] = sent
            if local.delay == local.inner_steps:  # CO2: a round begins at the outer weights
                take_over(turn)

    for step in range(1, work.steps + 1):
        if present and step in present:
            change_to(present[step])
        first, count = (step - 1) * work.samples, len(models)
        for island, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            cut = [work.samples * part // count for part in (island, island + 1)]
            loss, learned = _loss(model, range(first + cut[0], first + cut[1]))
            loss.backward()
            if work.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), work.max_norm)
            before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            if spoilt is not None and (island, step) == (spoilt.island, spoilt.step):
                with torch.no_grad():
                    torch._foreach_mul_(list(model.parameters()), spoilt.factor)
            optimizer.step()
            optimizer.zero_grad()
            losses[island].append(loss.item())
            since.append((loss.item() * learned, learned))
            for name, weight in model.named_parameters():
                unsent[island][name] = unsent[island][name] + before[name] - weight.detach()
            for turn in tokens:
                turn[island] += learned
        for number in range(local.fragments):
            close_round(number, step, last=step == work.steps)
    with torch.no_grad():
        evaluated = _loss(outer_model, range(HELD_OUT, HELD_OUT + work.samples))[0].item()
    return [Curve(each, evaluated, joint_losses) for each in losses]


def _inner(work: Work, model: torch.nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [weight], "weight_decay": 0.1 if model.decays(name) else 0.0}  # type: ignore[operator]
        for name, weight in model.named_parameters()
    ]
    if work.sgd:
        return torch.optim.SGD(groups, lr=work.lr)
    return torch.optim.AdamW(groups, lr=work.lr, betas=work.betas, eps=1e-8)


@dataclass
class Spoil(Hook):
    """Does that in the trainer's loop."""

    spoilt: Spoilt

    def before_update(self, loop: Loop) -> None:
        if (loop.mesh.island_number, loop.progress.step + 1) != (self.spoilt.island, self.spoilt.step):
            return
        for fragment in loop.engine.fragments():
            if fragment.role.startswith(ISLAND_WEIGHT):
                fragment.tensor.mul_(self.spoilt.factor)


def trained_islands(rank: int, world_size: int, works: Sequence[Work], spoilt: Spoilt | None = None) -> list[tuple[int, Curve]]:
    """Body for `run_ranks`: of each work the island of this rank, and its curve, by the trainer's own loop."""
    found: list[tuple[int, Curve]] = []
    for work in works:
        try:
            engine = build(work, world_size)
            mesh = engine.mesh  # type: ignore[attr-defined]
            done = take_steps(engine, work, range(work.steps), *([] if spoilt is None else [Spoil(spoilt)]))
            dealer = Assigner(mesh.layout.data_size)
            held_out = dealer.load(UnevenSamples(False), GlobalBatch(HELD_OUT, work.samples), work.micro, mesh.data_rank)
            evaluated = float(engine.evaluate(held_out.micro_batches).mean)
            engine.finish()
            found.append((mesh.island_number, Curve(done.losses, evaluated, done.joint_losses)))
        except Exception as error:
            error.add_note(f"in {work}")
            raise
    return found
