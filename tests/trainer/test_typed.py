"""A composed config as dataclasses: options, users' classes, wrong types; and back to plain containers."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
from omegaconf import OmegaConf

from meshloom.config.nodes import Custom
from meshloom.config.problems import ConfigError
from meshloom.models.config import CustomModel, DecoderConfig, ModelConfig
from meshloom.optim.batch.config import CustomBatch, NormTestConfig
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.trainer.config import TrainerConfig
from meshloom.trainer.schema import OPTIONS, RunConfig, groups, make_composer
from meshloom.trainer.sides import key_sides
from meshloom.trainer.typed import CUSTOM, plain_config, replace_keys, typed_config, typed_node, value_of
from support.configs import config_of


def test_a_group_is_its_options_dataclass() -> None:
    config = config_of("recipe=quickstart", "batch=norm_test", "batch.eta=0.3", "optim.betas=[0.8,0.9]")
    assert type(config.model) is DecoderConfig and type(config.optim) is AdamWConfig
    assert isinstance(config.batch, NormTestConfig) and config.batch.eta == 0.3
    assert config.optim.betas == [0.8, 0.9]


@pytest.mark.parametrize("group", filter(None, groups()))
def test_nothing_of_a_config_can_be_changed(group: str) -> None:
    config = config_of("recipe=quickstart")
    node = vars(config)[group]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, group, node)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(node, dataclasses.fields(node)[0].name, None)


@pytest.mark.parametrize("group", OPTIONS)
def test_every_option_is_of_its_groups_type(group: str) -> None:
    base = typing.get_type_hints(RunConfig)[group]
    assert all(issubclass(kind, base) for kind in (*OPTIONS[group], CUSTOM[group]))
    assert not issubclass(TrainerConfig, base)


def test_a_users_class_keeps_the_keys_of_its_node() -> None:
    """Also those called as fields of the dataclass; keys that are read of every option are typed."""
    node = {"_target_": "mine.Batch", "samples": 6, "path": "p", "keys": [1], "slope": {"a": 2}}
    custom = typed_node("batch", node)
    assert type(custom) is CustomBatch and custom.path == "mine.Batch" and custom.samples == 6
    assert custom.keys == {"samples": 6, "path": "p", "keys": [1], "slope": {"a": 2}}
    model = typed_node("model", {"_target_": "mine.Net", "vocabulary": 50, "tied": True})
    assert type(model) is CustomModel and isinstance(model, ModelConfig) and isinstance(model, Custom)
    assert (model.vocabulary, model.shares_weights, model.decoder()) == (50, True, None)
    sizes = {"dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "ffn_dim": 8}
    known = typed_node("model", {"_target_": "mine.Net", **sizes}).decoder()
    assert known is not None and (known.layers, known.vocabulary) == (2, None)


def test_values_of_another_type_are_told_by_key() -> None:
    with pytest.raises(ConfigError) as refused:
        typed_node("optim", {"_target_": "meshloom.optim.optimizers.adamw.AdamW", "eps": "small"})
    assert [problem.key for problem in refused.value.problems] == ["optim.eps"]


def wrong(*changes: tuple[str, Any]) -> tuple[RunConfig, list[str]]:
    """Type a config of which values were changed after it was composed."""
    config: Any = OmegaConf.create(OmegaConf.to_container(make_composer().compose(["recipe=quickstart"]).config))
    for key, value in changes:
        OmegaConf.update(config, key, value)
    found, problems = typed_config(config)
    return found, [problem.key for problem in problems]


def test_a_group_of_wrong_values_is_left_out_and_named() -> None:
    config, keys = wrong(("batch.micro", [1]), ("model.dim", "???"), ("seed", 7))
    assert sorted(keys) == ["batch.micro", "model.dim"] and config.unusable == {"batch", "model"}
    assert config.seed == 7 and config.optim.lr == config_of("recipe=quickstart").optim.lr
    assert config.problems() == [], "what is usable is in order"
    assert "optim.lr" in key_sides(config) and "batch.micro" not in key_sides(config)


def test_a_reference_to_a_missing_key_is_told_once() -> None:
    config, keys = wrong(("data.seq_len", "???"), ("batch.samples", "${data.seq_len}"))
    assert keys == ["data.seq_len"] and config.unusable == {"data", "batch"}


def test_values_left_to_laws_are_known_by_key() -> None:
    assert config_of("recipe=quickstart").left_to_laws == []
    both = config_of("recipe=quickstart", "optim.lr=auto:step_law", "batch.samples=auto:step_law")
    assert both.left_to_laws == ["batch.samples", "optim.lr"]


def test_replaced_keys_are_in_the_new_config_alone() -> None:
    config = config_of("recipe=quickstart", "optim._target_=mine.SGD", "optim.lr=0.5")
    other = replace_keys(config, {"optim.lr": 0.25, "parallel.zero": 1})
    assert (value_of(other, "optim.lr"), value_of(other, "parallel.zero")) == (0.25, 1)
    assert isinstance(other.optim, Custom) and other.optim.keys["lr"] == 0.25, "its class is given it"
    assert (value_of(config, "optim.lr"), value_of(config, "parallel.zero")) == (0.5, 3)
    assert isinstance(config.optim, Custom) and config.optim.keys["lr"] == 0.5


def test_plain_containers_type_as_the_same_config() -> None:
    words = ["recipe=quickstart", "schedule._target_=mine.Wave", "++schedule.period=5", "model.rope_scaling.kind=yarn"]
    config = config_of(*words)
    plain = plain_config(config)
    assert plain["schedule"]["_target_"] == "mine.Wave" and plain["schedule"]["period"] == 5
    assert typed_config(OmegaConf.create(plain)) == (config, [])
