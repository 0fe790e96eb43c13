"""The rhythm of rounds, written out by hand."""

from __future__ import annotations

from dataclasses import replace

from meshloom.optim.local.config import LocalConfig
from meshloom.optim.local.rounds import Rounds


def test_fragments_take_turns_at_equal_distances() -> None:
    rounds = Rounds(LocalConfig(islands=2, inner_steps=8, fragments=4))
    turns = {step: [number for number in range(4) if rounds.sends(number, step)] for step in range(1, 17)}
    expected = {2: [0], 4: [1], 6: [2], 8: [3], 10: [0], 12: [1], 14: [2], 16: [3]}
    assert turns == {step: expected.get(step, []) for step in range(1, 17)}


def test_layers_are_dealt_in_strides_and_the_rest_goes_last() -> None:
    rounds = Rounds(LocalConfig(islands=2, inner_steps=8, fragments=2))
    layers = {"embed": None, "layers.0": 0, "layers.1": 1, "layers.2": 2, "head": None}
    assert rounds.split(layers) == [["layers.0", "layers.2"], ["embed", "layers.1", "head"]]


def test_impossible_values_are_refused_by_key() -> None:
    def keys(**values: object) -> set[str]:
        return {each.key for each in LocalConfig(islands=2, **values).problems()}  # type: ignore[arg-type]

    assert keys() == set()
    assert keys(inner_steps=2, fragments=3) == {"optim.local.fragments"}
    assert keys(inner_steps=2, delay=3) == {"optim.local.delay"}
    assert keys(inner_steps=2, delay=2, mix=0.5) == keys(mix=0.5) == {"optim.local.mix"}
    assert keys(momentum=0.0) == {"optim.local.nesterov"}
    assert keys(dtype="fp8") == {"optim.local.dtype"}
    assert keys(quorum=3) == keys(quorum=0) == {"optim.local.quorum"} and keys(quorum=1) == set()
    assert keys(aggregate="median") == keys(aggregate="geometric_median") == {"optim.local.aggregate"}  # of two islands
    three = LocalConfig(islands=3, aggregate="geometric_median")
    assert [bool(replace(three, quorum=quorum).problems()) for quorum in (None, 3, 2)] == [False, False, True]
    assert keys(clip=0.0) == {"optim.local.clip"} and keys(clip=1.0, momentum=0.0, nesterov=False) == {"optim.local.clip"}
    assert keys(lr=0.0) == {"optim.local.lr"}


def test_arrays_that_islands_keep_are_counted_for_the_plan() -> None:
    plain = {"momentum": 0.0, "nesterov": False}
    kept = [LocalConfig(islands=2, **more).arrays for more in ({}, plain, {"delay": 1}, {**plain, "delay": 1})]  # type: ignore[arg-type]
    assert kept == [2, 1, 3, 2] and LocalConfig().arrays == 0
