"""The warning of a mixture whose tokens nearly all choose one expert."""

from __future__ import annotations

from typing import Any, cast

import pytest

from meshloom.models.mixture.config import ExpertsConfig
from meshloom.trainer.hooks.expert_load import WarnOfCollapse


def test_a_collapse_is_told_once_with_layer_and_share(caplog: pytest.LogCaptureFixture) -> None:
    hook, loop = WarnOfCollapse(ExpertsConfig(count=8, top_k=2)), cast(Any, None)
    hook.on_metrics(loop, {"step": 1, "loss": 2.0, "experts/3/load_max": 1.7})
    assert caplog.messages == []
    for step in (2, 3):
        hook.on_metrics(loop, {"step": step, "experts/3/load_max": 3.8, "experts/4/load_max": 4.0})
    assert len(caplog.messages) == 1
    assert "step 2: 95 % of the tokens choose one expert of layer 3" in caplog.messages[0]


def test_few_experts_are_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    WarnOfCollapse(ExpertsConfig(count=2, top_k=2)).on_metrics(cast(Any, None), {"step": 1, "experts/0/load_max": 1.0})
    assert caplog.messages == []


def test_a_relu_router_is_judged_by_the_experts_that_act(caplog: pytest.LogCaptureFixture) -> None:
    hook, loop = WarnOfCollapse(ExpertsConfig(count=8, top_k=8, router="relu")), cast(Any, None)
    hook.on_metrics(loop, {"step": 1, "experts/0/load_max": 1.1, "experts/0/active": 7.5})
    assert caplog.messages == []
    hook.on_metrics(loop, {"step": 2, "experts/0/load_max": 7.6, "experts/0/active": 1.0})
    assert "95 % of the tokens choose one expert of layer 0" in caplog.messages[0]
