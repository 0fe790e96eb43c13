"""Hugging Face, DCP and DeepSpeed folders: their own readers and writers are the oracles."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.convert.hugging_face.exporting import export
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.checkpoint.reading.compare import read_array
from meshloom.launch.checkpoint import main
from meshloom.models.decoder import Decoder
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.models import decoder

SHAPE = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def save_llama(folder: Path, tied: bool = False, **extra: Any) -> tuple[Path, Decoder]:
    torch.manual_seed(0)
    model = decoder(**SHAPE, vocabulary=99, tied=tied, rope_theta=1000.0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    held = [Fragment(name, "weight", tuple(p.shape), Box.whole(p.shape), p.detach()) for name, p in model.named_parameters()]
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync"))
    recipe = {
        "_target_": "meshloom.models.decoder.Decoder",
        **SHAPE,
        "vocabulary": None,
        "tied": tied,
        "rope_theta": 1000.0,
        **extra,
    }
    checkpointer.save(7, held, {"config": {"model": recipe}})
    checkpointer.finish()
    return folder / "step-00000007", model


@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_round_trip_keeps_the_logits(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'meshloom[hf]'")
    step, model = save_llama(tmp_path / "run", tied)
    folder = export(open_files(step), tmp_path / "hf", shard_bytes=20_000)
    assert (folder / "model.safetensors.index.json").is_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, 99, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), **CLOSE)
    theirs.save_pretrained(tmp_path / "saved")
    assert main(["import", str(tmp_path / "saved"), str(tmp_path / "back")]) == 0
    files = open_files(tmp_path / "back/step-00000000")
    manifest = load_manifest(files)
    for name, parameter in model.named_parameters():
        assert torch.equal(read_array(files, manifest, f"weight/{name}"), parameter)
    recipe = manifest.state["config"]["model"]
    assert {key: recipe[key] for key in SHAPE} == SHAPE
    assert (recipe["rope_theta"], recipe["tied"], recipe["vocabulary"]) == (1000.0, tied, 99)


def test_export_brings_the_tokenizer_and_converts_types(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'meshloom[hf]'")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["hello world"] * 9, trainers.BpeTrainer(vocab_size=60, special_tokens=["<|endoftext|>"]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    step, model = save_llama(tmp_path / "run")
    arguments = ["export", str(step), str(tmp_path / "hf"), "--dtype", "bf16", "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main(arguments) == 0
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded("hello world")["input_ids"] == tokenizer.encode("hello world").ids
    assert loaded.eos_token == "<|endoftext|>"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, model.head.weight.bfloat16())
    assert main(arguments) == 1  # the folder exists
    data = next(step.glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    assert main([*arguments[:2], str(tmp_path / "other")]) == 1
    assert not [path.name for path in tmp_path.iterdir() if "other" in path.name], "half of an export"


def test_shapes_unknown_to_hugging_faces_llama_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step, _ = save_llama(tmp_path / "run", mup_base=16)
    assert main(["export", str(step), str(tmp_path / "hf")]) == 1
    assert "muP" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "bert"}))
    assert main(["import", str(tmp_path / "other"), str(tmp_path / "x")]) == 1
    assert "only llama" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_dcp_folder_comes_in_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.randn(4, 6).bfloat16()).float().square().sum().backward()
        optimizer.step()
    states = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer), "note": {"a": object}}
    torch_dcp.save(states, checkpoint_id=tmp_path / "dcp/step-30", no_dist=True)
    assert main(["import", str(tmp_path / "dcp/step-30"), str(tmp_path / "ours")]) == 0
    files = open_files(tmp_path / "ours/step-00000030")
    manifest = load_manifest(files)
    for name, parameter in model.named_parameters():
        assert torch.equal(read_array(files, manifest, f"weight/{name}"), parameter)
        for role in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(read_array(files, manifest, f"{role}/{name}"), optimizer.state[parameter][role])
    assert len(manifest.arrays) == 12
    imported = manifest.state["imported_from"]
    assert imported["scalars"]["step/0.weight"] == 3.0
    assert "note.a" in imported["left_out"]
    assert main(["verify", str(tmp_path / "ours")]) == 0


def test_damaged_folders_of_others_are_refused_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def dcp_folder(name: str, state: dict[str, Any]) -> Path:
        torch_dcp.save(state, checkpoint_id=tmp_path / name, no_dist=True)
        return tmp_path / name

    def refused(source: Path, *words: str) -> None:
        assert main(["import", str(source), str(tmp_path / "ours")]) == 1
        said = capsys.readouterr().err
        assert all(word in said for word in (str(source), *words)), said
        assert not list((tmp_path / "ours").glob("step-*"))

    weights = {"model": {"w": torch.randn(4)}}
    for name, change in (("gone", lambda file: file.unlink()), ("cut", lambda file: os.truncate(file, 40))):
        for file in dcp_folder(name, weights).glob("*.distcp"):
            change(file)
        refused(tmp_path / name, "model.w")
    both = weights | {"optim": {"state": {"model.w": {"weight": torch.randn(4)}}}}
    assert main(["import", str(dcp_folder("twice", both)), str(tmp_path / "ours")]) == 1
    assert "two arrays are called weight/w" in capsys.readouterr().err
    odd = {"model": {"w": torch.zeros(2, dtype=torch.complex128)}}
    assert main(["import", str(dcp_folder("odd", odd)), str(tmp_path / "ours")]) == 1
    assert "weight/w: arrays of torch.complex128" in capsys.readouterr().err

    llama = tmp_path / "llama"
    llama.mkdir()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 9}
    for text in ("{bad", '{"model_type": "llama"}'):
        (llama / "config.json").write_text(text)
        refused(llama)
    (llama / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 2, **sizes}))
    (llama / "model.safetensors").write_bytes(b"123")
    refused(llama, "no safetensors file")

    zero = tmp_path / "zero"
    zero.mkdir()
    for content in ({"a": 1}, {"optimizer_state_dict": {"zero_stage": 1}}):
        torch.save(content, zero / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        torch.save({"param_shapes": [{"w": torch.Size([3])}]}, zero / "mp_rank_00_model_states.pt")
        refused(zero, "KeyError")


def test_arrays_without_elements_are_left_out(tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(4), "none": torch.zeros(0, 3)}}
    torch_dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert main(["import", str(tmp_path / "dcp"), str(tmp_path / "ours")]) == 0
    manifest = load_manifest(open_files(tmp_path / "ours/step-00000000"))
    assert list(manifest.arrays) == ["weight/w"]


def _train_with_deepspeed(rank: int, world: int, folder: str, stage: int) -> dict[str, dict[str, torch.Tensor]]:
    """Train three steps, save DeepSpeed's own checkpoint, and return the full fp32 state that DeepSpeed's accessors give."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from meshloom.parallel.deepspeed.setup import quiet

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 100},
    }
    with quiet():
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=config)
        for number in range(3):
            torch.manual_seed(number * world + rank)
            engine.backward(engine(torch.randn(2, 7)).square().sum())
            engine.step()
        engine.save_checkpoint(folder, tag="global_step3")
    return {
        name: {
            "weight": safe_get_full_fp32_param(parameter).clone(),
            "exp_avg": safe_get_full_optimizer_state(parameter, "exp_avg").clone(),
            "exp_avg_sq": safe_get_full_optimizer_state(parameter, "exp_avg_sq").clone(),
        }
        for name, parameter in engine.module.named_parameters()
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_imported_zero_folder_matches_deepspeeds_own_reading(tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    from meshloom.parallel.deepspeed.setup import import_deepspeed
    from support.ranks import run_ranks

    import_deepspeed("cpu")
    truth = run_ranks(2, _train_with_deepspeed, str(tmp_path / "ds"), stage)[0]
    assert main(["import", str(tmp_path / "ds"), str(tmp_path / "ours")]) == 0
    files = open_files(tmp_path / "ours/step-00000003")
    manifest = load_manifest(files)
    assert len(manifest.arrays) == 12
    for name, roles in truth.items():
        for role, value in roles.items():
            assert torch.equal(read_array(files, manifest, f"{role}/{name}"), value), (role, name)
    assert manifest.state["imported_from"]["counters"]["step"] == 3.0


def test_a_deepspeed_universal_folder_comes_in(tmp_path: Path) -> None:
    """Laid out as DeepSpeed's converter does it: full arrays for stages 1 and 2, flat ones with padding for stage 3."""
    tag = tmp_path / "step9_universal"
    values = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(5)}
    for name, value in values.items():
        (tag / "zero" / name).mkdir(parents=True)
        for role in ("fp32", "exp_avg"):
            torch.save({"param": value, "cat_dim": 0}, tag / f"zero/{name}/{role}.pt")
        torch.save(torch.cat([value.flatten(), torch.zeros(2)]), tag / f"zero/{name}/exp_avg_sq.pt")
        torch.save(torch.tensor(9.0), tag / f"zero/{name}/step.pt")
    torch.save({"param_shapes": [{name: value.shape for name, value in values.items()}]}, tag / "mp_rank_00_model_states.pt")
    (tmp_path / "latest_universal").write_text("step9_universal")
    assert main(["import", str(tmp_path), str(tmp_path / "ours"), "--format", "deepspeed"]) == 0
    files = open_files(tmp_path / "ours/step-00000009")
    manifest = load_manifest(files)
    for name, value in values.items():
        for role in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(read_array(files, manifest, f"{role}/{name}"), value)
