"""Folders of Hugging Face that can't be taken, and models that no family can express, are refused by the key or the name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from meshloom.launch.checkpoint import main
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.families import FAMILIES, family_of
from support.hf_folder import write_model

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
        ({"rope_theta": "1e6"}, "rope_theta='1e6' is no number"),
        ({"rope_theta": None}, "rope_theta is null"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_parameters.rope_theta is null"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' is no object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "rope_scaling.factor='4' is no number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is no number"),
        ({"num_attention_heads": 4.0}, "num_attention_heads=4.0 is no whole number"),
        ({"num_attention_heads": 0, "head_dim": True}, "num_attention_heads=0 is no whole number from 1 on; head_dim=True"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' is neither true nor false"),
        ({"layer_types": "full"}, "layer_types='full' is no list"),
        ({"model_type": ["qwen3"]}, "model_type ['qwen3']"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than 10000"),
        ({"num_local_experts": 10**9}, "num_local_experts=1000000000 is more than 10000"),
        ({"hidden_size": 10**30}, "config.json describes weights of impossible sizes"),
        ({"vocab_size": 10**18}, "config.json describes weights of impossible sizes"),
        ({"num_hidden_layers": 9999}, "config.json describes 9999 layers, and there are 25 tensors"),
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


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1], "it is cut off: its header describes"),
        (lambda data: data[:100], "it is cut off, or no safetensors file"),
        (lambda data: b"\xff" * 16 + data[16:], "it is cut off, or no safetensors file"),
        (lambda data: data[:8] + b"?" + data[9:], "its header is not JSON"),
        (lambda data: (200_000).to_bytes(8, "little") + b"[" * 200_000, "its header is not JSON"),
        (lambda data: data.replace(b'"shape":[29,', b'"shape":[1e999,', 1), "OverflowError"),
        (lambda data: data.replace(b'"F32"', b'"F16"', 1), "is not that of a safetensors file"),
        (lambda data: data.replace(b'"shape"', b'"shade"', 1), "is not that of a safetensors file (KeyError: 'shape')"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes], said: str
) -> None:
    write_folder(tmp_path / "theirs", *a_qwen())
    file = tmp_path / "theirs/model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    told = refusal(tmp_path, capsys)
    assert said in told and str(file) in told


def test_nested_json_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "theirs", *a_qwen())
    (tmp_path / "theirs/config.json").write_text("[" * 200_000)
    assert "config.json can't be read as JSON" in refusal(tmp_path, capsys)


def test_an_index_must_hold_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "theirs")
    index = tmp_path / "theirs/model.safetensors.index.json"
    first, second = sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))
    weight_map = json.loads(index.read_text())["weight_map"]
    name = next(name for name, file in weight_map.items() if file == first)
    index.write_text(json.dumps({"weight_map": weight_map | {name: second, "more": "gone.safetensors"}}))
    assert "gone.safetensors: the file is missing" in refusal(tmp_path, capsys)
    index.write_text(json.dumps({"weight_map": weight_map | {name: second}}))
    assert f"{name} should be in {second}, and is not" in refusal(tmp_path, capsys)
    (tmp_path / "theirs" / second).write_bytes((tmp_path / "theirs" / first).read_bytes())
    assert f"is in {first}, too" in refusal(tmp_path, capsys)
    index.write_text("{}")
    assert "has no weight_map" in refusal(tmp_path, capsys)


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
