"""Files that a client of Hugging Face's layout needs besides the weights, and those that count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as torch_dcp

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.launch.checkpoint import main
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.models import decoder

SHAPE = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn_dim": 24}
VOCABULARY = 257


def save(run: Path, **state: Any) -> Path:
    """Save a small decoder as a run does."""
    torch.manual_seed(0)
    model = decoder(**SHAPE, vocabulary=VOCABULARY)
    held = [Fragment(name, "weight", tuple(p.shape), Box.whole(p.shape), p.detach()) for name, p in model.named_parameters()]
    recipe = {"_target_": "meshloom.models.decoder.Decoder", **SHAPE, "vocabulary": None}
    checkpointer = Checkpointer(run / "checkpoints", Control.alone(), CheckpointConfig(mode="sync"))
    checkpointer.save(3, held, {"config": {"model": recipe, "data": {"seq_len": 64}}, **state})
    checkpointer.finish()
    return run


def saved_with_text(run: Path) -> Path:
    tokenizer = Tokenizer.bytes()
    save(run, tokenizer=tokenizer.fingerprint, end_of_document=tokenizer.end_of_document)
    tokenizer.save(run / "tokenizer.json")
    return run


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def exported(run: Path, *words: str) -> Path:
    folder = run.parent / f"{run.name}-out"
    assert main(["export", str(run), str(folder), *words]) == 0
    return folder


def test_the_end_of_documents_is_the_end_of_sequences(tmp_path: Path) -> None:
    folder = exported(saved_with_text(tmp_path / "run"))
    special = {key: value for key, value in read(folder).items() if key.endswith("_token_id")}
    assert special == {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}
    assert read(folder, "generation_config.json") == {"eos_token_id": 256}
    assert read(folder, "tokenizer_config.json")["eos_token"] == "<|endoftext|>"


def test_transformers_finds_all_of_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'meshloom[hf]'")
    folder = exported(saved_with_text(tmp_path / "run"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (256, None)
    assert transformers.AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == [97]


def test_a_run_without_text_states_no_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = exported(save(tmp_path / "run"))
    assert read(folder)["eos_token_id"] is None
    assert read(folder, "generation_config.json") == {}
    assert not (folder / "tokenizer.json").exists() and "no tokenizer.json beside" in caplog.text


def test_another_tokenizer_beside_it_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = save(tmp_path / "run", tokenizer="another", end_of_document=256)
    Tokenizer.bytes().save(run / "tokenizer.json")
    assert not (exported(run) / "tokenizer.json").exists()
    assert "not the tokenizer that the model was trained with" in caplog.text


def test_an_imports_config_comes_out_again(tmp_path: Path) -> None:
    folder = exported(saved_with_text(tmp_path / "run"))
    config = read(folder) | {"eos_token_id": [7, 8], "bos_token_id": 5, "max_position_embeddings": 4096}
    settings = {"temperature": 0.6, "eos_token_id": [7, 8, 9]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert main(["import", str(folder), str(tmp_path / "imported/checkpoints")]) == 0
    again = exported(tmp_path / "imported")
    for key in ("eos_token_id", "bos_token_id", "max_position_embeddings"):
        assert read(again)[key] == config[key]
    assert read(again, "generation_config.json") == settings | {"bos_token_id": 5}
    assert (again / "tokenizer.json").is_file()


@pytest.mark.parametrize(("size", "files"), [("20KB", 3), ("0.02MB", 3), ("1GiB", 1), ("20000", 3)])
def test_the_size_of_shards_is_typed(tmp_path: Path, size: str, files: int) -> None:
    folder = exported(save(tmp_path / "run"), "--shard-size", size)
    assert len(list(folder.glob("*.safetensors"))) == files


@pytest.mark.parametrize("size", ["big", "0GB", "2XB", "-1"])
def test_a_value_that_is_no_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    assert main(["export", str(save(tmp_path / "run")), str(tmp_path / "out"), f"--shard-size={size}"]) == 1
    assert "is no size" in capsys.readouterr().err


def test_one_file_counts_before_an_index(tmp_path: Path) -> None:
    folder = exported(save(tmp_path / "run"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0


def test_an_index_names_files_of_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(save(tmp_path / "run"))
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 1
    assert "outside its folder" in capsys.readouterr().err


def test_pickled_weights_are_named_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(save(tmp_path / "run"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 1
    assert "only safetensors can be read; convert them" in capsys.readouterr().err


def test_hugging_faces_names_in_a_dcp_folder_stay(tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(exported(save(tmp_path / "run")) / "model.safetensors")
    torch_dcp.save(weights, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert main(["import", str(tmp_path / "dcp"), str(tmp_path / "ours")]) == 0
    held = load_manifest(open_files(tmp_path / "ours/step-00000000")).arrays
    assert set(held) == {f"weight/{name}" for name in weights}


def test_arrays_of_no_known_part_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {"model": {"w": torch.ones(2)}, "sampler": {"offsets": torch.ones(2)}}
    torch_dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert main(["import", str(tmp_path / "dcp"), str(tmp_path / "ours")]) == 0
    assert "neither weights nor of an optimizer: sampler.offsets" in caplog.text


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_weight_of_a_universal_folder_comes_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], differs: bool
) -> None:
    tag = tmp_path / "step9_universal"
    for number, name in enumerate(("embed.weight", "head.weight")):
        (tag / "zero" / name).mkdir(parents=True)
        for role in ("fp32", "exp_avg", "exp_avg_sq"):
            value = torch.arange(6.0).reshape(3, 2) + number * differs
            torch.save({"param": value, "cat_dim": 0}, tag / f"zero/{name}/{role}.pt")
    model = {"param_shapes": [{"embed.weight": torch.Size([3, 2])}], "shared_params": {"head.weight": "embed.weight"}}
    torch.save(model, tag / "mp_rank_00_model_states.pt")
    (tmp_path / "latest_universal").write_text("step9_universal")
    assert main(["import", str(tmp_path), str(tmp_path / "ours")]) == differs
    if differs:
        assert "ties it to embed.weight, but their values differ" in capsys.readouterr().err
        return
    held = load_manifest(open_files(tmp_path / "ours/step-00000009")).arrays
    assert set(held) == {f"{role}/embed.weight" for role in ("weight", "exp_avg", "exp_avg_sq")}
