"""The number of islands that the processes of a run make when machines are lost, written out by hand."""

from __future__ import annotations

import pytest

from meshloom.optim.local.config import SYNCHRONOUS, LocalConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import island_count
from meshloom.trainer.launching import LaunchConfig, full_processes

FOUR, PLAIN = LocalConfig(islands=4, quorum=2), ParallelConfig()


def test_as_many_islands_as_processes_make_take_part() -> None:
    """All where they can; otherwise the most down to the quorum."""
    assert [island_count(FOUR, PLAIN, processes) for processes in (4, 8, 3, 6, 2, 10)] == [4, 4, 3, 3, 2, 2]
    refused = [(LocalConfig(islands=4), 3), (FOUR, 1), (FOUR, 7)]
    assert [island_count(local, PLAIN, processes) for local, processes in refused] == [4, 4, 4]
    assert island_count(SYNCHRONOUS, PLAIN, 7) == 1


def test_the_layout_of_an_island_is_legal() -> None:
    assert [island_count(FOUR, ParallelConfig(tp=2), processes) for processes in (8, 6, 4)] == [4, 3, 2]
    assert island_count(FOUR, ParallelConfig(replicate=2, zero=1), 12) == 3  # of 4 processes; four would have 3


@pytest.mark.parametrize(("machines", "islands"), [(4, 4), (3, 3), (2, 2)])
def test_islands_of_whole_machines_stay_so(machines: int, islands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 processes could make four islands, too, of six: they would lie on two machines each."""
    launch, processes = LaunchConfig(nodes="2:4", nproc=8), 8 * machines
    for name, value in (("RANK", "0"), ("WORLD_SIZE", str(processes)), ("GROUP_WORLD_SIZE", str(machines))):
        monkeypatch.setenv(name, value)
    assert island_count(FOUR, PLAIN, processes, full_processes(launch, processes)) == islands


@pytest.mark.parametrize(("processes", "full"), [(32, 32), (24, 32), (16, 32), (20, 20), (40, 40)])
def test_a_launcher_counts_machines_by_their_processes(processes: int, full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 are no whole machines, and 40 are more than it has: such numbers are taken for all machines'."""
    monkeypatch.delenv("RANK", raising=False)
    assert full_processes(LaunchConfig(nodes="2:4", nproc=8), processes) == full


def test_machines_that_nobody_counts_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler may set the variables of torchrun, all but the number of machines."""
    launch, processes = LaunchConfig(nodes="4", nproc=8), 32
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    one_is_enough = LocalConfig(islands=4, quorum=1)
    assert island_count(one_is_enough, PLAIN, processes, full_processes(launch, processes)) == 4


def test_islands_of_several_machines_are_cut_anew_where_one_machine_is_lost() -> None:
    """Three machines of four: 24 processes are one island of 16 and a half."""
    assert island_count(LocalConfig(islands=2, quorum=1), PLAIN, 24, full=32) == 2
    assert full_processes(LaunchConfig(nodes=1), 24) == 0
