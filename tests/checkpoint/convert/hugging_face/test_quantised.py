"""Weights stored as blocks of fp8 or MXFP4 come in as bf16, and layers of DeepSeek-V3 behind the last are left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from meshloom.checkpoint.convert.hugging_face.folder import open_folder
from meshloom.checkpoint.convert.hugging_face.reading import read_box
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.compare import read_array
from meshloom.checkpoint.restore import restore
from meshloom.launch.checkpoint import main
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.checkpoint_worlds import together
from support.hf_families import make_model

pytest.importorskip("transformers", reason="needs the extra: pip install 'meshloom[hf]'")

BLOCK = (5, 4)
"""Rows and columns that share a scale; it does not divide all widths."""


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix as codes and scales, as DeepSeek stores it, and what they stand for: block by block, in a loop."""
    rows, columns = (-(-extent // size) for extent, size in zip(weight.shape, BLOCK, strict=True))
    codes, scales, values = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns), weight.clone()
    for row in range(rows):
        for column in range(columns):
            at = slice(row * BLOCK[0], (row + 1) * BLOCK[0]), slice(column * BLOCK[1], (column + 1) * BLOCK[1])
            scales[row, column] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[row, column]).to(torch.float8_e4m3fn)
            values[at] = codes[at].float() * scales[row, column]
    return codes, scales, values.bfloat16()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny DeepSeek-V3 in fp8 with a layer behind the last, and the values of its tensors."""
    place = tmp_path_factory.mktemp("deepseek")
    make_model("DeepSeek-V3").bfloat16().save_pretrained(place)
    values, stored = load_file(place / "model.safetensors"), dict[str, torch.Tensor]()
    for name, value in values.items():
        stored[name] = value
        if "_proj" in name:
            stored[name], stored[f"{name}_scale_inv"], values[name] = quantised(value.float())
    stored["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)
    save_file(stored, place / "model.safetensors")
    config: dict[str, Any] = json.loads((place / "config.json").read_text())
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    config |= {"quantization_config": how, "num_nextn_predict_layers": 1}
    (place / "config.json").write_text(json.dumps(config))
    return place, values


def test_fp8_blocks_are_decoded_while_reading(
    folder: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place, values = folder
    assert main(["import", str(place), str(tmp_path / "ours")]) == 0
    assert "1 tensors are left behind: model.layers.3.eh_proj.weight" in caplog.text
    files = open_files(tmp_path / "ours/step-00000000")
    manifest = load_manifest(files)
    stacked = torch.cat([values[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] for expert in range(8)])
    assert torch.equal(read_array(files, manifest, "weight/layers.1.ffn.experts.w2"), stacked)
    latent = values["model.layers.2.self_attn.kv_a_proj_with_mqa.weight"]
    assert torch.equal(read_array(files, manifest, "weight/layers.2.attention.wkv_a.weight"), latent)
    assert torch.equal(read_array(files, manifest, "weight/norm.weight"), values["model.norm.weight"])


def test_a_box_inside_fp8_blocks_is_decoded_alone(folder: tuple[Path, dict[str, torch.Tensor]]) -> None:
    place, values = folder
    opened = open_folder(place)
    weight = values["model.layers.0.mlp.gate_proj.weight"]
    for box in (Box((3, 2), (4, 9)), Box((5, 4), (5, 4)), Box((11, 15), (1, 1))):
        assert torch.equal(read_box(opened, "layers.0.ffn.w1.weight", box), weight[box.slices()])


def test_only_layers_that_predict_more_tokens_are_left_behind(
    folder: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    place, _ = folder
    fragments = [
        Fragment(each.name, "weight", each.shape, Box.whole(each.shape), torch.empty(each.shape))
        for each in open_folder(place).manifest.arrays.values()
    ]
    together(2, lambda control: restore(f"hf:{place}", fragments, control))
    assert caplog.text.count("1 tensors are left behind: model.layers.3.eh_proj.weight") == 1, "one rank says it"
    (tmp_path / "half").mkdir()
    (tmp_path / "half/model.safetensors").symlink_to(place / "model.safetensors")
    config = json.loads((place / "config.json").read_text())
    for changed in ({"num_hidden_layers": 2}, {"num_nextn_predict_layers": 0}):
        (tmp_path / "half/config.json").write_text(json.dumps(config | changed))
        assert main(["import", str(tmp_path / "half"), str(tmp_path / "ours")]) == 1
        said = capsys.readouterr().err
        assert "model.layers.3.eh_proj.weight is no weight of such a model" in said and "model.layers.2." not in said


def test_codes_without_scales_are_refused(
    folder: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = folder
    tensors = load_file(place / "model.safetensors")
    del tensors["model.layers.0.mlp.gate_proj.weight_scale_inv"]
    (tmp_path / "broken").mkdir()
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    (tmp_path / "broken" / "config.json").write_text((place / "config.json").read_text())
    assert main(["import", str(tmp_path / "broken"), str(tmp_path / "ours")]) == 1
    assert "model.layers.0.mlp.gate_proj.weight is stored as F8_E4M3" in capsys.readouterr().err


def test_blocks_of_another_quantisation_are_not_decoded(
    folder: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = folder
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").symlink_to(place / "model.safetensors")
    config = json.loads((place / "config.json").read_text())
    how = {"quant_method": "mxfp4", "weight_block_size": 7}
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"quantization_config": how}))
    assert main(["import", str(tmp_path / "other"), str(tmp_path / "ours")]) == 1
    assert "is stored as F8_E4M3" in capsys.readouterr().err


def test_mxfp4_is_decoded_as_by_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    make_model("gpt-oss", hidden_size=64, intermediate_size=32).bfloat16().save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs/model.safetensors")
    expected: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        codes = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 130, codes.shape[:-1], dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(codes, scales).contiguous()
    save_file(tensors, tmp_path / "theirs/model.safetensors")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    opened = open_folder(tmp_path / "theirs")
    both, down = (expected[f"model.layers.1.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    gate, up = (torch.cat([each.T[first::2] for each in both]) for first in (0, 1))
    for ours, values in (("w1", gate), ("w3", up), ("w2", torch.cat([each.T for each in down]))):
        for box in (Box.whole(values.shape), Box((30, 7), (5, 20)), Box((1, 5), (2, 1))):
            assert torch.equal(read_box(opened, f"layers.1.ffn.experts.{ours}", box), values[box.slices()]), (ours, box)
