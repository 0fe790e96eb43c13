"""Plans of whole matrices: every part reaches all who need it, by few messages, and copies cross the network once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from meshloom.parallel.exchange_levels import exchange_levels
from meshloom.parallel.matrix_plan import MatrixPlan, MatrixSpan, Parts, Wave, choose_owners
from meshloom.parallel.routes import Hop, Numbers

MATRICES = ((12, 5), (7, 4), (3, 3), (2, 6), (12, 5))
SPANS: list[MatrixSpan] = [*((number, 0, *shape) for number, shape in enumerate(MATRICES)), (5, 0, 4, 3), (5, 4, 4, 3)]
SHAPES = (*MATRICES, (8, 3))  # the last stacks two


def boxes_of(shapes: tuple[tuple[int, int], ...], copies: int, shards: int, tp: int = 1) -> Numbers:
    """The boxes of all ranks, copies × shards × tp of them: rows over shards, and columns over tp."""

    def cut(extent: int, count: int, number: int) -> tuple[int, int]:
        piece = -(-extent // count)
        start = min(number * piece, extent)
        return start, min(piece, extent - start)

    table = np.zeros((copies * shards * tp, len(shapes), 4), dtype=np.int64)
    for rank in range(len(table)):
        for at, (rows, columns) in enumerate(shapes):
            (row, height), (column, width) = cut(rows, shards, rank // tp % shards), cut(columns, tp, rank % tp)
            table[rank, at] = row, column, height, width
    return table


@dataclass(frozen=True)
class Case:
    """copies × shards × tp ranks, and the levels that they are cut into."""

    levels: tuple[int, ...]
    copies: int = 1
    shards: int = 1
    tp: int = 1

    def plan(self) -> MatrixPlan:
        return MatrixPlan.of(SPANS, boxes_of(SHAPES, self.copies, self.shards, self.tp), lambda a, b: a * b, self.levels)

    @property
    def ranks(self) -> int:
        return self.copies * self.shards * self.tp


CASES = [
    Case((6,), shards=3, tp=2),
    Case((4, 2), shards=8),
    Case((2, 3), shards=6),
    Case((2, 2, 3), shards=6, tp=2),
    Case((4, 2), copies=2, shards=4),  # a copy on each host
    Case((4, 2), copies=4, shards=2),  # two on each
    Case((2, 2, 2), copies=8),
    Case((2, 4), copies=2, shards=2, tp=2),
]


def peer(rank: int, levels: tuple[int, ...], level: int, place: int) -> int:
    stride = int(np.prod(levels[:level]))
    return rank + (place - rank // stride % levels[level]) * stride


def travel(case: Case, ways: list[list[Hop]], held: dict[int, set[int]]) -> tuple[dict[int, set[int]], Counter[int]]:
    """Carry parts from rank to rank. Returns what each rank has at the end, and how often each part changes hosts."""
    crossings: Counter[int] = Counter()
    for at in range(len(case.levels)):
        arrived: dict[int, set[int]] = {rank: set() for rank in range(case.ranks)}
        messages: dict[tuple[int, int], list[int]] = {}
        for rank, hops in enumerate(ways):
            hop = hops[at]
            for part, place in zip(hop.send.tolist(), hop.to.tolist(), strict=True):
                assert part in held[rank], "what is sent is held"
                messages.setdefault((rank, peer(rank, case.levels, hop.level, place)), []).append(part)
        for rank, hops in enumerate(ways):
            hop = hops[at]
            for part, place in zip(hop.receive.tolist(), hop.came_from.tolist(), strict=True):
                sender = peer(rank, case.levels, hop.level, place)
                assert messages[sender, rank].pop(0) == part, "both sides list a message's parts alike"
                assert part not in arrived[rank], "once"
                arrived[rank].add(part)
                crossings[part] += sender // case.levels[0] != rank // case.levels[0]
        assert not any(messages.values()), "whatever is sent is received"
        held = arrived
    return held, crossings


@pytest.mark.parametrize(("shards", "tp", "copies"), [(1, 1, 1), (3, 1, 2), (5, 2, 1), (16, 1, 1), (30, 2, 1)])
def test_parts_are_what_a_bare_loop_finds(shards: int, tp: int, copies: int) -> None:
    """Matrices of unlike rows are stacked in parameters, and shards end anywhere in them; some ranks have nothing."""
    heights = ((3, 1, 4, 1, 5, 9), (7,), (2, 6, 2))
    spans = [(at, sum(rows[:number]), rows[number], 5 + at) for at, rows in enumerate(heights) for number in range(len(rows))]
    boxes = boxes_of(tuple((sum(rows), 5 + at) for at, rows in enumerate(heights)), copies, shards, tp)
    parts = Parts.find(spans, boxes)
    expected: dict[tuple[int, ...], list[int]] = {}
    for matrix, (parameter, first, rows, _) in enumerate(spans):
        for rank in range(len(boxes)):
            row, column, height, width = boxes[rank, parameter].tolist()
            begin, end = max(row, first), min(row + height, first + rows)
            if begin < end and width:
                expected.setdefault((matrix, begin, column, end - begin, width), []).append(rank)
    found = [(matrix, *box) for matrix, box in zip(parts.matrix.tolist(), parts.boxes.tolist(), strict=True)]
    assert found == sorted(expected)
    assert [parts.ranks[parts.held == part].tolist() for part in range(len(found))] == [expected[each] for each in found]
    assert (np.diff(parts.held) >= 0).all()


@pytest.mark.parametrize("case", CASES)
def test_parts_reach_their_owner_and_results_all_holders(case: Case) -> None:
    plan = case.plan()
    numbers = [at % 3 for at in range(len(SPANS))]
    waves: list[list[Wave]] = [list(plan.waves(rank, numbers)) for rank in range(case.ranks)]
    holders: dict[int, set[int]] = {}
    for part, rank in zip(plan.parts.held.tolist(), plan.parts.ranks.tolist(), strict=True):
        holders.setdefault(part, set()).add(rank)
    owner = {part: plan.owners[matrix] for part, matrix in enumerate(plan.parts.matrix.tolist())}
    rows_of_all = sum(rows * columns for *_, rows, columns in SPANS)
    assert plan.parts.sizes.sum() == rows_of_all, "parts make up the matrices"
    for number in range(3):
        mine = {part for part, matrix in enumerate(plan.parts.matrix.tolist()) if numbers[matrix] == number}
        held = {rank: {part for part in mine if rank in holders[part]} for rank in range(case.ranks)}
        there, crossings = travel(case, [list(of[number].gather) for of in waves], held)
        assert there == {rank: {part for part in mine if owner[part] == rank} for rank in range(case.ranks)}
        for part in mine:
            senders = {rank for rank, of in enumerate(waves) if part in of[number].gather[0].send}
            assert senders == {owner[part]} if owner[part] in holders[part] else len(senders & holders[part]) == 1
        hosts = {part: {rank // case.levels[0] for rank in holders[part]} for part in mine}
        home = {part: owner[part] // case.levels[0] for part in mine}
        if len(case.levels) == 2:
            assert all(crossings[part] == int(home[part] not in hosts[part]) for part in mine), "from the nearest holder"
        back, crossings = travel(case, [list(of[number].scatter) for of in waves], there)
        assert back == held
        if len(case.levels) == 2:
            assert all(crossings[part] == len(hosts[part] - {home[part]}) for part in mine), "once to each host"


def test_a_small_copy_does_not_turn_the_way_of_all_results() -> None:
    """Of 8 ranks, 4 a host, all hold rows of each matrix, and pairs on a host the same rows of the last: a router."""
    case, shapes = Case((4, 2), shards=4, tp=2), ((64, 8), (64, 8), (4, 8))
    boxes = boxes_of(shapes, 1, case.shards, case.tp)
    boxes[:, 2, 1], boxes[:, 2, 3] = 0, 8
    for matrices, levels in (((0, 1, 2), [0, 1]), ((2,), [1, 0])):
        spans = [(at, 0, *shapes[matrix]) for at, matrix in enumerate(matrices)]
        plan = MatrixPlan.of(spans, boxes[:, matrices], lambda a, b: a * b, case.levels)
        waves = [next(plan.waves(rank, [0] * len(spans))) for rank in range(case.ranks)]
        assert all([hop.level for hop in wave.scatter] == levels for wave in waves), "by all of its host's ranks"
        there = {rank: set[int]() for rank in range(case.ranks)}
        for part, matrix in enumerate(plan.parts.matrix.tolist()):
            there[plan.owners[matrix]].add(part)
        held, _ = travel(case, [list(wave.scatter) for wave in waves], there)
        assert held == {rank: set(plan.parts.held[plan.parts.ranks == rank].tolist()) for rank in range(case.ranks)}


def test_owners_lie_on_as_many_hosts_as_can_be() -> None:
    everyone = [range(8)] * 9
    assert choose_owners([1.0] * 9, everyone, (4, 2)) == [0, 4, 1, 5, 2, 6, 3, 7, 0]
    assert choose_owners([1.0] * 9, everyone) == [*range(8), 0]
    assert choose_owners([1.0, 5.0, 1.0], [range(4, 8), range(8), range(8)], (4, 2)) == [4, 0, 1], "the heaviest first"


def messages_of(
    ranks: list[int], shards: int, levels: tuple[int, ...], shape: tuple[int, int], count: int
) -> list[tuple[int, int]]:
    """By rank, the messages that it sends and receives in an update of matrices of a shape, each rank with rows of all."""
    shapes = (shape,) * count
    plan = MatrixPlan.of([(at, 0, *shape) for at in range(count)], boxes_of(shapes, 1, shards), lambda a, b: a * b, levels)
    found: list[tuple[int, int]] = []
    for rank in ranks:
        (wave,) = plan.waves(rank, [0] * count)
        hops = [(hop, rank // int(np.prod(levels[: hop.level])) % levels[hop.level]) for hop in (*wave.gather, *wave.scatter)]
        sent, received = (
            sum(len(set(peers.tolist()) - {me}) for peers, me in each)
            for each in ([(hop.to, me) for hop, me in hops], [(hop.came_from, me) for hop, me in hops])
        )
        found.append((sent, received))
    return found


def test_a_rank_of_thousands_sends_few_messages() -> None:
    levels = exchange_levels([rank // 8 for rank in range(4096)], "auto")
    owner, other = 3, 4095
    (sent, received), (others_sent, _) = messages_of([owner, other], 4096, (4096,), (4096, 1), 16)
    assert (sent, received) == (4095 + 15, 4095 + 15) and others_sent == 16
    for sent, received in messages_of([owner, other], 4096, levels, (4096, 1), 16):
        assert sent <= 2 * 53 and received <= 2 * 53
