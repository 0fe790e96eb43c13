"""Checks before a run: what is slow or different is found, and only that."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.launch.check import table
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.trainer.preflight.check import Check
from meshloom.trainer.preflight.judge import findings, usual_rate
from meshloom.trainer.preflight.measures import STORAGE_BYTES, Report, pairings, storage_rate
from support.ranks import run_ranks

H200 = "NVIDIA H200"
GOOD = 780e12  # FLOP/s; DESIGN.md measured about 790 TFLOP/s


def reports(**changed: dict[int, Any]) -> list[Report]:
    """Four H200 on two nodes, all well but for these fields of these ranks."""
    found: list[Report] = []
    for rank in range(4):
        links = {peer: 300e9 if peer // 2 == rank // 2 else 40e9 for peer in range(4) if peer != rank}
        good = Report(rank, f"node{rank // 2}", H200, GOOD, 4.2e12, links, 1e9, "", 1e9, {"torch": "2.11", "python": "3.11"})
        more = {name: by_rank[rank] for name, by_rank in changed.items() if rank in by_rank}
        found.append(dataclasses.replace(good, **more))
    return found


FAULTS: dict[str, tuple[dict[str, dict[int, Any]], list[str]]] = {
    "nothing": ({}, []),
    "a slow product": ({"product": {2: 0.8 * GOOD}}, ["rank 2 (node1, NVIDIA H200) reaches 624 TFLOP/s"]),
    "all slower than their kind": ({"product": dict.fromkeys(range(4), 0.5 * GOOD)}, ["is usual for its kind"] * 4),
    "a slow memory": ({"copy": {0: 3e12}}, ["rank 0 (node0, NVIDIA H200) reaches 3000 GB/s in a copy"]),
    "a slow link inside": ({"links": {0: {1: 100e9, 2: 40e9, 3: 40e9}}}, []),  # the only one of its node: half of all inside
    "a slow link across": (
        {"links": {0: {1: 300e9, 2: 9e9, 3: 40e9}}},
        ["and 2 (node1) carries 9 GB/s; 40 is usual"],
    ),
    "a folder": ({"storage": {1: "/x: no room"}}, ["node0: /x: no room"]),
    "another version": (
        {"versions": {3: {"torch": "2.10", "python": "3.11"}}},
        ["torch is 2.11 on most nodes, and node1 has"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(name: str) -> None:
    changed, said = FAULTS[name]
    found = findings(reports(**changed))
    assert len(found) == len(said) and all(part in text for part, text in zip(said, found, strict=True)), found


def test_a_clock_that_is_wrong() -> None:
    three = [dataclasses.replace(each, host=f"node{each.rank}") for each in reports(clock={1: 1e9 + 7.5})]
    assert findings(three) == ["the clock of node1 is 7.5 s ahead: set it by NTP"]


def test_processors_are_not_compared() -> None:
    assert findings([dataclasses.replace(each, device="processor") for each in reports(product={1: 1e9}, copy={2: 1e6})]) == []


def test_usual_rates_are_those_of_the_data_sheet() -> None:
    assert usual_rate(H200, "product") == pytest.approx(989e12 * 0.75) and usual_rate(H200, "copy") == pytest.approx(
        4.8e12 * 0.88
    )
    assert usual_rate("Some GPU", "product") is None


@pytest.mark.parametrize("ranks", range(1, 9))
def test_each_pair_meets_once_and_no_rank_twice_a_round(ranks: int) -> None:
    rounds = list(pairings(ranks))
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(one, other) for one in range(ranks) for other in range(one + 1, ranks)]
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) == max(0, ranks - 1 + ranks % 2)


def test_storage(tmp_path: Path) -> None:
    rate, wrong = storage_rate(tmp_path / "new")
    assert rate > 0 and wrong == "" and list((tmp_path / "new").iterdir()) == [] and STORAGE_BYTES % 2**20 == 0
    (tmp_path / "file").write_text("")
    rate, wrong = storage_rate(tmp_path / "file")
    assert rate == 0 and "File exists" in wrong


def check_on(rank: int, world_size: int, folder: str) -> list[Report]:
    mesh = Mesh.connect(Layout.plan(ParallelConfig(), world_size), torch.device("cpu"))
    check = Check(mesh, Path(folder), whole=True)
    for _, run in check.parts():
        run()
    return check.report()


def test_a_whole_check_of_three_ranks(tmp_path: Path) -> None:
    first, *others = run_ranks(3, check_on, str(tmp_path))
    assert others == [[], []] and findings(first) == []
    assert [sorted(each.links) for each in first] == [[1, 2], [0, 2], [0, 1]]
    assert all(each.product and each.copy and each.versions["torch"] == torch.__version__ for each in first)
    lines = table(first)
    assert len(lines) == 1 + 3 + sum(each.write is not None for each in first) + 1 and "GB/s to " in lines[1]
