"""Classes named by `_target_`: the names that checkpoints hold and those of today all lead to a class."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from omegaconf import OmegaConf

from meshloom.config.renames import MOVED, with_moved_targets
from meshloom.trainer.schema import register_schemas

RECIPES = Path(__file__).parents[2] / "recipes"
OF_FORMAT_2 = [
    "meshloom.models.llama.Llama",
    "meshloom.data.nodes.Stdlib",
    "meshloom.data.nodes.Text",
    "meshloom.data.nodes.Jsonl",
    "meshloom.data.nodes.Parquet",
    "meshloom.data.nodes.Hf",
    "meshloom.data.nodes.Shards",
    "meshloom.data.mixture.Mixture",
    "meshloom.data.synthetic.Synthetic",
    "meshloom.optim.adamw.AdamW",
    "meshloom.optim.agvm.AGVM",
    "meshloom.optim.layerwise.LAMB",
    "meshloom.optim.layerwise.LARS",
    "meshloom.optim.adagrad.AdaGrad",
    "meshloom.optim.adagrad.AdaGradNorm",
    "meshloom.optim.schedule.Constant",
    "meshloom.optim.schedule.Cosine",
    "meshloom.optim.schedule.Linear",
    "meshloom.optim.wsd.WSD",
    "meshloom.optim.wsd.Power",
    "meshloom.optim.batch.Fixed",
    "meshloom.optim.batch.Stages",
    "meshloom.optim.batch.Ramp",
    "meshloom.optim.adaptive.NormTest",
    "meshloom.optim.adaptive.InnerProduct",
    "meshloom.optim.adaptive.Augmented",
    "meshloom.optim.adaptive.NoiseScale",
    "meshloom.optim.adaptive.CriticalLoss",
]
"""Every `_target_` that checkpoints of format 2 hold."""


@pytest.mark.parametrize("old", OF_FORMAT_2)
def test_every_old_target_still_names_a_class(old: str) -> None:
    now = with_moved_targets({"_target_": old})["_target_"]
    found = get_object(now)
    assert inspect.isclass(found) and found.__name__ == now.rpartition(".")[2]


def test_every_rename_serves_some_old_target() -> None:
    assert [old for old in MOVED if not any(target.startswith(old) for target in OF_FORMAT_2)] == []


def test_targets_are_renamed_at_any_depth_and_nothing_else() -> None:
    node = {"_target_": "meshloom.optim.wsd.WSD", "note": "meshloom.optim.wsd.WSD"}
    assert with_moved_targets({"a": [node, 1], "_target_": "mine.Model"}) == {
        "a": [{"_target_": "meshloom.optim.schedules.wsd.WSD", "note": "meshloom.optim.wsd.WSD"}, 1],
        "_target_": "mine.Model",
    }


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in plain containers."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from targets(value)


def schemas(folder: dict[str, Any]) -> Iterator[Any]:
    """The registered nodes, at any depth."""
    for entry in folder.values():
        if isinstance(entry, dict):
            yield from schemas(entry)
        else:
            yield entry.node


def test_every_target_of_schemas_and_recipes_names_a_class() -> None:
    register_schemas()
    own = (node.get("_target_") for node in schemas(ConfigStore.instance().repo) if "_target_" in node)
    found = {target for target in own if target and target.startswith("meshloom.")}
    assert len(found) > 20
    for path in RECIPES.rglob("*.yaml"):
        found |= set(targets(OmegaConf.to_container(OmegaConf.load(path))))
    for target in sorted(found):
        assert inspect.isclass(get_object(target)), target
