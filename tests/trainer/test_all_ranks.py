"""Rank 0 acts for all: its result or its exception comes to every rank, also where it can't be pickled."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meshloom.config.problems import ConfigError, Problem
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.trainer.all_ranks import PeerFailed, from_main, raise_on_all_ranks
from support.ranks import run_ranks


class UnpicklableProblem(Problem):
    """A problem of a user's own class, with something in it that belongs to this process."""

    def __reduce_ex__(self, protocol: Any) -> str:
        raise TypeError("this problem can't be pickled")


class UnreadableResult:
    """Something that can be pickled and not be read back."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def refuse() -> None:
    raise ConfigError([UnpicklableProblem("a.key", "is wrong", "mend it")])


def body(rank: int, world_size: int) -> list[str]:
    mesh = Mesh.connect(Layout.plan(ParallelConfig(), world_size), torch.device("cpu"))
    said: list[str] = []
    for action in (lambda: "a result", lambda: open("/no/such/file"), threading.Lock, UnreadableResult, refuse):  # noqa: PTH123, SIM115
        try:
            said.append(str(from_main(mesh, action)))
        except PeerFailed as error:
            said.append(f"PeerFailed, config_error={error.config_error}")
        except Exception as error:
            said.append(type(error).__name__)
    mesh.close()
    return said


def test_every_rank_gets_what_rank_0_has_or_raises() -> None:
    same = ["a result", "FileNotFoundError", "TypeError", "TypeError"]
    assert run_ranks(2, body, timeout=30) == [[*same, "ConfigError"], [*same, "PeerFailed, config_error=True"]]


@pytest.mark.usefixtures("no_collection")
def test_an_action_that_fails_leaves_no_memory_to_the_garbage_collection() -> None:
    tensor = torch.zeros(3)
    held = weakref.ref(tensor)

    def run(values: torch.Tensor) -> None:
        mesh: Any = SimpleNamespace(any=bool)  # of one rank
        raise_on_all_ranks(mesh, lambda: values.view(2))

    with pytest.raises(RuntimeError, match="invalid for input of size 3"):
        run(tensor)
    del tensor
    assert held() is None
