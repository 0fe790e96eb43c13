"""Local updating: an island's part in the outer steps, and its state beside the optimizer's (docs/local_updating.md).

An island is a mesh of its own, whose ranks take ordinary steps. Beside each local shard of a weight lies the outer weight,
which is the value that all islands agreed on last. Outer steps are elementwise, so a rank exchanges what it holds with the
ranks at its place in the other islands, whatever the layout is, as long as all islands have the same.

What travels (`travel.py`) is the difference between the outer weight and the island's. Where `delay` is larger than 0, the
island goes on meanwhile, and the mean is used that many steps later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from ...models.protocol import Model
from ...optim.local.config import LocalConfig
from ...optim.local.outer import outer_step
from ...optim.local.rounds import Rounds
from ...optim.local.wire import wire_of
from ...optim.optimizers.own_arrays import RUN
from ..box import Box
from ..fragment import Fragment
from ..mesh import Mesh
from .travel import Flight, GramSum, Header, Route
from .weights import Weights

OUTER_MOMENTUM, DIFFERENCE, ISLAND_WEIGHT, ROUND = "outer_momentum", "difference", "island_weight", "islands.round"
"""Roles of the arrays of local updating, and the name of what an island counts. `weight` is the outer weight."""
_UNKNOWN, _KNOWN = -1.0, 1.0


def role_on_island(role: str, island: int) -> str:
    """Return the role of an island's own array.

    The optimizer state of the first island has the usual names: a run without islands can go on with it.
    """
    return role if island == 0 and role != ISLAND_WEIGHT else f"{role}@{island}"


def layers_of_weights(model: Model) -> dict[str, int | None]:
    """Return the layer of each weight of a whole model, by name; None: it is in none."""
    layers = {id(weight): layer for layer, module in model.block_modules().items() for weight in module.parameters()}
    return {name: layers.get(id(weight)) for name, weight in model.named_parameters()}


@dataclass
class TravelGroup:
    """Weights that travel together.

    own, outer   this rank's shards of the island's weights, which the inner optimizer updates, and of the outer weights
    momenta      of the outer optimizer; empty without momentum
    difference   what travels, where it takes steps: a resumed run sends it again. Empty without a delay
    sent_at      the step after which differences left last; `before`: tokens since then, of steps before a resume
    """

    names: Sequence[str]
    own: list[torch.Tensor]
    outer: list[torch.Tensor]
    momenta: list[torch.Tensor]
    difference: list[torch.Tensor]
    route: Route
    flight: Flight | None = None
    sent_at: int = 0
    before: float = 0.0


@dataclass
class Islands:
    """This rank's part in local updating. Implements `engine.OuterSteps`."""

    config: LocalConfig
    mesh: Mesh
    weights: Weights
    turns: list[TravelGroup]
    rounds: Rounds = field(init=False)
    _tokens: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    _losses: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    _joint_loss: float | None = None
    _round: torch.Tensor = field(init=False)
    _absent: torch.Tensor = field(init=False)
    _begun: bool = False

    def __post_init__(self) -> None:
        self.rounds = Rounds(self.config)
        counted = 1 + 3 * len(self.turns)
        self._round, self._absent = (
            torch.full((rows, counted), _UNKNOWN, dtype=torch.float64, device=self.mesh.device)
            for rows in (1, self.config.islands - self.present)
        )

    @classmethod
    def of(cls, config: LocalConfig, mesh: Mesh, weights: Weights, layers: Mapping[str, int | None]) -> Islands:
        """Make it over weights that have their initial values. layers: of each weight"""

        hosts = mesh.group_of_hosts() if config.aggregate == "geometric_median" else None
        copies = mesh.weight_axes["dense"].copies

        def turn(names: Sequence[str]) -> TravelGroup:
            own = [weights.local[name].tensor.detach() for name in names]
            counts = [copies.size() / weights.placed[name].copies for name in names]
            gram = None if hosts is None else GramSum(hosts, counts)
            route = Route(mesh, copies, wire_of(config.dtype), [each.shape for each in own], own[0] if own else None, gram)
            momenta = [torch.zeros_like(each) for each in own] if config.momentum else []
            difference = [torch.zeros_like(each) for each in own] if config.delay else []
            return TravelGroup(names, own, [each.clone() for each in own], momenta, difference, route)

        turns = [turn(names) for names in Rounds(config).split({name: layers[name] for name in weights.local})]
        return cls(config, mesh, weights, turns)

    @property
    def present(self) -> int:
        """The number of islands that take part: all of the recipe's, or fewer where others are lost."""
        return 1 if self.mesh.across is None else self.mesh.across.size()

    def count(self, step: int, tokens: torch.Tensor, loss: torch.Tensor) -> None:
        """See `engine.OuterSteps`."""
        self._begun = True
        self._tokens[step] = tokens
        self._losses[step] = torch.where(tokens > 0, loss * tokens, 0.0)  # that of a step that was skipped may be no number

    def due(self, step: int, *, last: bool) -> bool:
        """Return whether something leaves or arrives after this step. last: of the run, after which nothing may be under way"""
        return last or any(
            self.rounds.sends(number, step) or self._arrives(turn, step) for number, turn in enumerate(self.turns)
        )

    @staticmethod
    def _arrives(turn: TravelGroup, step: int) -> bool:
        return turn.flight is not None and step >= turn.flight.due

    @torch.no_grad()
    def exchange(self, step: int, *, stop: bool, last: bool) -> bool:
        """Send what leaves after this step, and take the outer steps of what arrives.

        stop: whether this island wants the run to stop. Returns whether some island did, as far as is known by now: the same
        on all of them.
        """
        stops = False
        self.weights.wait_all_gather(compute_copies=True)
        for number, turn in enumerate(self.turns):
            leaves = last or self.rounds.sends(number, step)
            arrives = turn.flight is not None and (last or self._arrives(turn, step))
            # One round late (CO2), an island goes on from x when differences leave: it has its own of the new round now, and
            # loses its weights to those that arrive. Otherwise what has left is in its weights until it takes over the mean.
            leaving = self._difference(turn) if leaves and self._round_late else None
            if arrives:
                stops |= self._arrive(turn)
            if not leaves:
                continue
            self._send(turn, self._difference(turn) if leaving is None else leaving, step, stop=stop, last=last)
            if last or not self.config.delay:
                stops |= self._arrive(turn)
            elif self._round_late and not arrives:  # the first round
                _copy(turn.own, turn.outer)
        oldest = min(turn.sent_at for turn in self.turns)
        self._tokens = {at: tokens for at, tokens in self._tokens.items() if at > oldest}
        self._losses = {at: loss for at, loss in self._losses.items() if at > oldest}
        self.weights.masters_written()
        return stops

    @property
    def _round_late(self) -> bool:
        return self.config.delay == self.config.inner_steps

    @staticmethod
    def _difference(turn: TravelGroup) -> list[torch.Tensor]:
        """Return outer weights minus the island's: in the arrays that are kept under a delay, otherwise in new ones."""
        if not turn.difference:
            return [outer - own for outer, own in zip(turn.outer, turn.own, strict=True)]
        for outer, own, into in zip(turn.outer, turn.own, turn.difference, strict=True):
            torch.sub(outer, own, out=into)
        return turn.difference

    def _send(self, turn: TravelGroup, leaving: list[torch.Tensor], step: int, *, stop: bool, last: bool) -> None:
        due = step if last else step + self.config.delay
        tokens = float(self._tokens_since(turn))
        header = Header(tokens, stop)
        if turn is self.turns[0]:  # or a step's loss would be in the rounds of several fragments
            header = replace(header, loss=float(_sum_since(self._losses, turn.sent_at)), loss_tokens=tokens - turn.before)
        turn.sent_at, turn.before = step, 0.0
        turn.flight = turn.route.send(leaving, due, header)

    def _arrive(self, turn: TravelGroup) -> bool:
        assert turn.flight is not None
        mean, stops = turn.route.receive(turn.flight)
        if turn.flight.loss is not None:
            self._joint_loss = turn.flight.loss
        turn.flight = None
        outer_step(self.config, turn.outer, turn.momenta, mean)
        if self.config.mix and turn.own:
            torch._foreach_mul_(turn.own, self.config.mix)
            torch._foreach_add_(turn.own, turn.outer, alpha=1 - self.config.mix)
        else:
            _copy(turn.own, turn.outer)
        return stops

    def _tokens_since(self, turn: TravelGroup) -> torch.Tensor | float:
        """Return the tokens that the island has learned from since differences left last; on the device, if there are some."""
        return _sum_since(self._tokens, turn.sent_at) + turn.before

    def numbers(self) -> dict[str, float]:
        """See `engine.OuterSteps`."""
        routes = [turn.route for turn in self.turns]
        sent, waited = sum(route.sent_bytes for route in routes), sum(route.wait_seconds for route in routes)
        for route in routes:
            route.sent_bytes, route.wait_seconds = 0, 0.0
        exchanged = {"islands/bytes": sent, "islands/wait_seconds": waited} if sent or waited else {}
        if self._joint_loss is not None:
            exchanged["islands/loss"], self._joint_loss = self._joint_loss, None
        return {"islands/present": self.present, **exchanged}

    @contextlib.contextmanager
    def outer_weights(self) -> Generator[None]:
        """Put the outer weights into the place of the island's: what an evaluation sees, and what a checkpoint publishes."""
        own = [tensor for turn in self.turns for tensor in turn.own]
        self.weights.wait_all_gather(compute_copies=True)
        kept = [tensor.clone() for tensor in own]
        _copy(own, [tensor for turn in self.turns for tensor in turn.outer])
        self.weights.masters_written()
        try:
            yield
        finally:
            _copy(own, kept)
            self.weights.masters_written()

    def fragments(self, of_island: Iterable[Fragment]) -> Iterator[Fragment]:
        """Yield the arrays of a rank: those of the island, under its own names, and those of the outer steps.

        of_island: the rank's weights and optimizer state, as a run without islands lists them
        """
        island = self.mesh.island_number
        weights: dict[str, Fragment] = {}
        for each in of_island:
            if each.role == "weight":
                weights[each.name] = each
                yield replace(each, role=role_on_island(ISLAND_WEIGHT, island))
            elif each.role == RUN:
                yield replace(each, name=role_on_island(each.name, island))
            else:
                yield replace(each, role=role_on_island(each.role, island))
        for turn in self.turns:
            roles = {"weight": turn.outer, OUTER_MOMENTUM: turn.momenta, f"{DIFFERENCE}@{island}": turn.difference}
            for role, tensors in roles.items():
                for name, tensor in zip(turn.names, tensors or [], strict=bool(tensors)):
                    if name in weights:
                        yield replace(weights[name], role=role, tensor=tensor)
        self._note_round()
        for first, rows in ((island, self._round), (self.present, self._absent)):
            if len(rows):
                shape = self.config.islands, rows.shape[1]
                yield Fragment(ROUND, RUN, shape, Box((first, 0), tuple(rows.shape)), rows)

    def _note_round(self) -> None:
        """Write what the island counts into the array that is saved.

        For each turn: tokens since differences left last; the step at which those under way are due, and their tokens.
        """
        if not self._begun:
            return  # what is there is what a checkpoint has been read into, if one has
        counts: list[torch.Tensor | float] = [_KNOWN]
        for turn in self.turns:
            counts.append(self._tokens_since(turn))
            counts += [0.0, 0.0] if turn.flight is None else [turn.flight.due, turn.flight.tokens]
        for place, number in zip(self._round[0], counts, strict=True):  # one by one: the host does not wait for the device
            place.copy_(number) if isinstance(number, torch.Tensor) else place.fill_(number)

    def prepare_restore(self) -> None:
        """Mark all that a checkpoint may hold as unknown."""
        self._tokens.clear()
        self._losses.clear()
        self._begun = False
        self._round.fill_(_UNKNOWN)

    @torch.no_grad()
    def restored(self) -> None:
        """Go on from what has been restored: send again what was under way. Every rank of all islands must call it.

        An island that the checkpoint does not hold begins at the outer weights, and adds nothing to what was under way: all of
        them do where it holds weights alone, or is of a run with another `islands`.
        """
        self._absent.fill_(_UNKNOWN)
        rounds = self._gather_rounds()
        mine = rounds[self.mesh.island_number]
        known = mine[0] == _KNOWN
        for number, turn in enumerate(self.turns):
            tokens, _, sent = mine[1 + 3 * number :][:3] if known else (0.0, 0.0, 0.0)
            due = max([row[2 + 3 * number] for row in rounds if row[0] == _KNOWN], default=0.0)
            turn.before, turn.sent_at = tokens, 0
            if not known:
                _copy(turn.own, turn.outer)
                for each in turn.difference:
                    each.zero_()
            on_the_way = due and self.config.delay
            turn.flight = turn.route.send(turn.difference, round(due), Header(sent)) if on_the_way else None
        self._tokens.clear()
        self._losses.clear()
        self._begun = True

    def _gather_rounds(self) -> list[list[float]]:
        """Return what each island that is present has restored of its round."""
        mine = self._round.cpu()
        if self.mesh.across is None:
            return mine.tolist()
        rows = torch.empty(self.present, mine.shape[1], dtype=mine.dtype)
        dist.all_gather(list(rows.split(1)), mine, self.mesh.across)
        return rows.tolist()

    def finish(self) -> None:
        """Wait for what is under way, which a resumed run sends again."""
        for turn in self.turns:
            if turn.flight is not None:
                turn.flight.wait()


def of_first_island(fragment: Fragment, saved_islands: int) -> Fragment:
    """Return an island's own fragment as that of the first island, where a checkpoint of so many islands has no such island.

    It then begins with the first island's optimizer state, to which the optimizer's counters belong, too.
    """
    named = fragment.name if fragment.role == RUN else fragment.role
    base, _, island = named.rpartition("@")
    if not island.isdecimal() or int(island) < saved_islands or base in (ISLAND_WEIGHT, DIFFERENCE):
        return fragment
    return replace(fragment, name=base) if fragment.role == RUN else replace(fragment, role=base)


def for_islands_of(fragments: Iterable[Fragment], saved_islands: int, *, elastic: bool) -> list[Fragment]:
    """Return what a run reads of a checkpoint of so many islands.

    elastic: whether islands may have come since (`optim.local.quorum`), whose own weights it need not hold
    """
    found = [of_first_island(fragment, saved_islands) for fragment in fragments if not _is_later_round(fragment, saved_islands)]
    return [each for each in found if not (elastic and is_of_absent_island(each.key, saved_islands))]


def _is_later_round(fragment: Fragment, saved_islands: int) -> bool:
    """Return whether a fragment is what an island counts of which a checkpoint has no weights: nothing is known of it."""
    return (fragment.name, fragment.role) == (ROUND, RUN) and fragment.box.offsets[0] >= saved_islands


def is_of_absent_island(key: str, present: int) -> bool:
    """Return whether an array of a checkpoint, by its key, is an island's own, and so many islands are without it."""
    role, _, name = key.partition("/")
    _, _, island = (name if role == RUN else role).rpartition("@")
    return island.isdecimal() and int(island) >= present


def _sum_since(numbers: Mapping[int, torch.Tensor], step: int) -> torch.Tensor | float:
    """Return the sum of the numbers of the steps after this one; on the device, if there are some."""
    later = [number.double().reshape(()) for at, number in numbers.items() if at > step]
    return torch.stack(later).sum() if later else 0.0


def _copy(into: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    if into:
        torch._foreach_copy_(list(into), list(values))
