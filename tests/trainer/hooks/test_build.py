"""The hooks of a run have an order, and ranks agree on some things while they are built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from meshloom.data.assignment import Share
from meshloom.data.batch import Sample
from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.data.validation import ValidationPart
from meshloom.trainer.hooks.build import HookParts, build_evaluation, build_hooks
from meshloom.trainer.hooks.saving import Saving
from meshloom.trainer.loop import PlansDiffer
from support.configs import config_of

SAMPLE = Sample(np.zeros(4, np.int64), np.zeros(4, np.int64), None)
PART: Any = ValidationPart("law", 1.0, [SAMPLE] * 4)  # type: ignore[arg-type]


def names(*words: str, main: bool) -> list[str]:
    """The classes of the hooks of rank 0, or of another, of a run with a named validation set that saves."""
    user = "trainer.hooks=[{_target_: support.run_hooks.Name}]"
    config = config_of("recipe=quickstart", "trainer.compare_replicas_every=50", "tasks.names=[arc_easy]", user, *words)
    mesh: Any = SimpleNamespace(is_main=main, data_rank=0, layout=SimpleNamespace(world_size=2, data_size=2))
    data: Any = SimpleNamespace(tokenizer=Tokenizer.bytes(), validation=lambda: None)
    dealer: Any = SimpleNamespace(load=lambda *_: Share([], passes=1, workers=1))
    parts: dict[str, Any] = {"engine": SimpleNamespace(islands=None), "shape": config.model, "build": lambda: None}
    run = HookParts(config, mesh, data, dealer, dtype=torch.float32, tokenizer_settings=None, **parts)
    checkpointer: Any = SimpleNamespace(config=SimpleNamespace(memory_every=None))
    return [type(hook).__name__ for hook in build_hooks(run, [PART], Saving(checkpointer, 50, {}))]


def test_what_a_save_depends_on_comes_before_it_and_tasks_behind() -> None:
    order = ["CollectGarbage", "Name", "Evaluation", "CompareReplicas", "Saving", "TaskEvaluation"]
    assert names(main=False) == order
    assert names("trainer.compare_replicas_every=null", "trainer.eval_every=0", "tasks.names=[]", main=False) == [
        "CollectGarbage",
        "Name",
        "Saving",
    ]


def test_rank_0_profiles_first_and_logs_last() -> None:
    found = names("trainer.profile_step=3", "trainer.sample_prompt=once", "logging.progress=true", main=True)
    assert found[0] == "ProfileStep" and found[1:7] == names(main=False)
    alone = found[7:]
    assert alone[:3] == ["RebuiltHistory", "NameStragglers", "SampleText"] and "ProgressLine" in alone[3:]
    experts = names("model=moe_tiny", main=True)
    assert experts.index("ExpertMap") < experts.index("ProgressLine"), "loggers take up its pictures"


@pytest.mark.parametrize("others", [7, 8])
def test_plans_of_validation_samples_are_compared(others: int) -> None:
    mesh: Any = SimpleNamespace(data_rank=0, codes=lambda code: [code, code, others])
    dealer: Any = SimpleNamespace(load=lambda *_: Share([], passes=1, workers=1, checksum=7))
    config = config_of("recipe=quickstart")
    if others == 7:
        build_evaluation(config, [PART], mesh, dealer, ())
        return
    with pytest.raises(PlansDiffer, match="validation set law: rank 2 deals the batch's documents in another way"):
        build_evaluation(config, [PART], mesh, dealer, ())
