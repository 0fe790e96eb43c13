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
    "llama2_7b": ("llama", 6_738_415_616),
    "llama3.1_8b": ("llama", 8_030_261_248),
    "llama3.2_1b": ("llama", 1_235_814_400),
    "llama3.2_3b": ("llama", 3_212_749_824),
    "llama3.3_70b": ("llama", 70_553_706_496),
    "qwen2.5_0.5b": ("qwen2", 494_032_768),
    "qwen2.5_7b": ("qwen2", 7_615_616_512),
    "qwen3_0.6b": ("qwen3", 596_049_920),
    "qwen3_1.7b": ("qwen3", 1_720_574_976),
    "qwen3_4b": ("qwen3", 4_022_468_096),
    "qwen3_8b": ("qwen3", 8_190_735_360),
    "olmo2_1b": ("olmo2", 1_484_916_736),
    "olmo2_7b": ("olmo2", 7_298_617_344),
    "olmo3_7b": ("olmo3", 7_298_011_136),
    "gemma2_2b": ("gemma2", 2_614_341_888),
    "gemma2_9b": ("gemma2", 9_241_705_984),
    "gemma3_1b": ("gemma3_text", 999_885_952),
    "gemma3_4b": ("gemma3_text", 3_880_263_168),
    "mistral_7b": ("mistral", 7_241_732_096),
    "smollm3_3b": ("smollm3", 3_075_098_624),
    "phi3_mini": ("phi3", 3_821_079_552),
    "mixtral_8x7b": ("mixtral", 46_702_792_704),
    "olmoe_1b_7b": ("olmoe", 6_919_161_856),
    "qwen3_30b_a3b": ("qwen3_moe", 30_532_122_624),
    "qwen3_235b_a22b": ("qwen3_moe", 235_093_634_560),
    "deepseek_v3": ("deepseek_v3", 671_026_404_352),
    "gpt_oss_20b": ("gpt_oss", 20_914_757_184),
}
"""Recipe → family and parameters, as the safetensors files of the public models sum up to."""

ACTIVE = {
    "mixtral_8x7b": 12.9,
    "olmoe_1b_7b": 1.3,
    "qwen3_30b_a3b": 3.4,
    "qwen3_235b_a22b": 22.2,
    "deepseek_v3": 37.6,
    "gpt_oss_20b": 4.2,
}
"""Recipe → parameters that a token passes, in billions, with the embedding. Published: 12.9, 1.3, 3.3, 22 and 37; 3.6 without
the embedding."""


@pytest.mark.parametrize("recipe", ACTIVE)
def test_a_mixture_has_the_published_number_of_active_weights(recipe: str) -> None:
    config = decoder_config(
        {str(key): value for key, value in make_composer().compose([f"model={recipe}"]).config.model.items()}
    )
    assert round(parameter_count(config, active=True) / 1e9, 1) == ACTIVE[recipe]
    assert family_of(config) is FAMILIES[PUBLISHED[recipe][0]]


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_has_the_published_number_of_weights(recipe: str) -> None:
    found = make_composer().compose([f"model={recipe}"])
    assert found.problems == []
    config = decoder_config({str(key): value for key, value in found.config.model.items()})
    assert config.problems() == []
    model_type, parameters = PUBLISHED[recipe]
    assert parameter_count(config) == parameters
    assert family_of(config, model_type) is FAMILIES[model_type]
