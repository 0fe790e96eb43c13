"""config.yaml of a run's folder: YAML that reads back as the config, each key with its side."""

from __future__ import annotations

import yaml
from omegaconf import OmegaConf

from meshloom.trainer.sides import annotated_yaml
from meshloom.trainer.typed import plain_config
from support.configs import config_of


def test_it_reads_back_as_the_config() -> None:
    config = config_of(
        "recipe=quickstart",
        "data=mixture",
        "data.weights={c4.en:0.5,code:2}",
        "trainer.sample_prompt='# two: lines, {quoted}'",
        "++parallel.deepspeed.config.a.b=[1,2]",
        "optim.betas=[0.8,0.9]",
    )
    text = annotated_yaml(config)
    assert yaml.safe_load(text) == plain_config(config)
    assert OmegaConf.to_container(OmegaConf.create(text)) == plain_config(config)


def test_every_line_of_a_key_names_its_side() -> None:
    lines = annotated_yaml(config_of("recipe=quickstart")).splitlines()
    assert "seed: 1  # recipe" in lines and "  tp: 1  # placement" in lines and "  keep: 3  # habit" in lines
