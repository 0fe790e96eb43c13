"""Ranks agree on some things while a run is built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from meshloom.data.assignment import Share
from meshloom.data.validation import ValidationPart
from meshloom.trainer.build import _evaluation
from meshloom.trainer.loop import PlansDiffer
from support.configs import config_of


@pytest.mark.parametrize("others", [7, 8])
def test_plans_of_validation_samples_are_compared(others: int) -> None:
    mesh: Any = SimpleNamespace(data_rank=0, codes=lambda code: [code, code, others])
    dealer: Any = SimpleNamespace(load=lambda *_: Share([], passes=1, workers=1, checksum=7))
    part: Any = ValidationPart("law", 1.0, range(4))  # type: ignore[arg-type]
    if others == 7:
        _evaluation(config_of("recipe=quickstart"), [part], mesh, dealer, ())
        return
    with pytest.raises(PlansDiffer, match="validation set law: rank 2 deals the batch's documents in another way"):
        _evaluation(config_of("recipe=quickstart"), [part], mesh, dealer, ())
