"""Problems that only building a run's objects shows: an optimizer of a user's own that no engine could drive."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from meshloom.optim.optimizers.parameters import NamedParameter, Shards, decay_groups
from support.configs import problems_of

WORDS = ["recipe=quickstart", "data=synthetic", "~optim.betas", "~optim.eps", "~optim.fused", "~optim.weight_decay"]


def plain(parameters: Sequence[NamedParameter], shards: Shards, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter.tensor for parameter in parameters], lr)


def matrices_only(parameters: Sequence[NamedParameter], shards: Shards, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(decay_groups([one for one in parameters if one.decay], 0.1), lr)


def no_optimizer(**_: Any) -> object:
    return object()


def grouped(parameters: Sequence[NamedParameter], shards: Shards, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(decay_groups(parameters, 0.1), lr)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (plain, "SGD has a parameter group without 'lr_scale', .*; give .* decay_groups"),
        (matrices_only, "SGD has probe.bias in no parameter group, and would not train it"),
        (no_optimizer, "object is no torch.optim.Optimizer"),
        (grouped, None),
    ],
)
def test_an_optimizer_that_no_engine_can_drive_is_refused(make: Any, said: str | None) -> None:
    found = problems_of(1, *WORDS, f"optim._target_={__name__}.{make.__name__}")
    if said is None:
        assert found == {}
    else:
        assert found.keys() == {"optim"} and re.search(said, found["optim"])
