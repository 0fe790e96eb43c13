"""Folders of Hugging Face that can't be taken, and models that no family can express, are refused by the key or the name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from meshloom.launch.checkpoint import main
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.families import FAMILIES, family_of

SHAPE: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 12, "vocabulary": 29, "head_dim": 8}


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")


def a_qwen(**keys: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A config.json and its weights."""
    config = DecoderConfig.of({**SHAPE, "qk_norm": "head", **keys})
    family = FAMILIES["qwen3"]
    values = dict(Decoder(config).named_parameters())
    return family.to_hugging_face(config), {
        part.name: values[ours].detach().clone() for ours, (part,) in family.stored_weights(config).items()
    }


def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 1
    assert not (tmp_path / "ours").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type=dynamic"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.rope_type=mrope"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: weights of fp8"),
        ({"hidden_act": "relu"}, "hidden_act=relu"),
        ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 2, "sliding_window": 4}, "chunked_attention"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 3, "sliding_window": 4}, "names 3 layers"),
        ({"num_key_value_heads": 3}, "model.kv_heads"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, but lm_head.weight is not the embedding"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is no weight of such a model"),
        ({"intermediate_size": 13}, "mlp.gate_proj.weight has the shape [12, 16], but config.json describes [13, 16]"),
    ],
)
def test_a_folder_is_refused_by_the_key_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], said: str
) -> None:
    config, weights = a_qwen()
    write_folder(tmp_path / "theirs", {**config, "layer_types": None, **changed}, weights)
    assert said in refusal(tmp_path, capsys)


def test_weights_of_eight_bits_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, weights = a_qwen()
    name = "model.layers.1.mlp.up_proj.weight"
    write_folder(tmp_path / "theirs", config, {**weights, name: weights[name].to(torch.float8_e4m3fn)})
    assert f"{name} is stored as F8_E4M3" in refusal(tmp_path, capsys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sinks": True}, "model.sinks=True"),
        ({"mup_base": 8}, "muP"),
        ({"rope_interleaved": True}, "model.rope_interleaved=True"),
        ({"layer_types": ["nope", "sliding"], "sliding_window": 4}, "model.layer_types"),
        ({"embedding_scale": 2.0}, "model.embedding_scale=2.0"),
        ({"qkv_bias": True, "ffn_bias": True}, "model.qkv_bias=True has no place there (it would be read as False)"),
    ],
)
def test_a_decoder_of_no_family_is_refused_by_its_key(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="of no family that can be exported") as caught:
        family_of(DecoderConfig.of({**SHAPE, **keys}))
    assert said in str(caught.value)


def test_an_asked_family_must_have_all_parts() -> None:
    plain = DecoderConfig.of(SHAPE)
    assert family_of(plain) is FAMILIES["llama"]
    assert family_of(plain, "mistral") is FAMILIES["mistral"]
    with pytest.raises(ValueError, match=r"as qwen3: model.qk_norm=none .* read as head"):
        family_of(plain, "qwen3")
