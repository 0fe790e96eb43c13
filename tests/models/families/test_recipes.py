"""Recipes of families have the number of parameters that is published with the models, and can be exported as such."""

from __future__ import annotations

import pytest

from meshloom.models.config import decoder_config
from meshloom.models.costs import parameter_count
from meshloom.models.families import FAMILIES, family_of
from meshloom.trainer.schema import make_composer

PUBLISHED = {
    "llama_8b": ("llama", 8_030_261_248),
    "llama_70b": ("llama", 70_553_706_496),
    "qwen2.5_0.5b": ("qwen2", 494_032_768),
    "qwen2.5_7b": ("qwen2", 7_615_616_512),
    "qwen3_0.6b": ("qwen3", 596_049_920),
    "qwen3_1.7b": ("qwen3", 1_720_574_976),
    "qwen3_4b": ("qwen3", 4_022_468_096),
    "qwen3_8b": ("qwen3", 8_190_735_360),
}
"""Recipe → family and parameters, as the safetensors files of the public models sum up to."""


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_has_the_published_number_of_weights(recipe: str) -> None:
    found = make_composer().compose([f"model={recipe}"])
    assert found.problems == []
    config = decoder_config({str(key): value for key, value in found.config.model.items()})
    assert config.problems() == []
    model_type, parameters = PUBLISHED[recipe]
    assert parameter_count(config) == parameters
    assert family_of(config) is FAMILIES[model_type]
