"""A run that begins from a model folder of Hugging Face, without an import between: `resume=hf:<folder>`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.checkpoint.control import Control
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import open_step
from meshloom.checkpoint.reading.compare import diff, read_array
from meshloom.checkpoint.restore import restore
from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.launch.checkpoint import main
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.checkpoint_worlds import together
from support.configs import resolve_words
from support.hf_folder import write_model
from support.ranks import run_ranks
from support.tiny_run import SYNTHETIC, train

WORDS = [
    *("recipe=quickstart", *SYNTHETIC, "batch.samples=8", "batch.micro=2", "precision=fp32", "schedule=constant"),
    *(
        "schedule.warmup=0",
        "checkpoint.mode=sync",
        "trainer.eval_every=0",
        "trainer.sample_prompt=null",
        "logging.progress=false",
    ),
]


def trained(ranks: int, folder: Path, *words: str) -> Path:
    """The last step of a run with these words."""
    base = [word for word in WORDS if word not in SYNTHETIC] if "data=jsonl" in words else WORDS
    assert run_ranks(ranks, train, [*base, f"output_dir={folder}", *words]) == [0] * ranks
    return max((folder / "checkpoints").glob("step-*"))


def problems(*words: str) -> str:
    return "\n".join(map(str, resolve_words([], [*WORDS, *words], 1).problems))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ["parallel.zero=1"]),
        (2, ["parallel.zero=3"]),
        (2, ["parallel.tp=2"]),
        (2, ["parallel.pp=2"]),
        (2, ["parallel.engine=deepspeed", "parallel.zero=2"]),
    ],
)
def test_training_begins_with_the_folder_s_weights(tmp_path: Path, ranks: int, words: list[str]) -> None:
    if "parallel.engine=deepspeed" in words:
        pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    weights = write_model(tmp_path / "theirs", torch.bfloat16, qk_norm="head", head_dim=6)
    start = [f"resume=hf:{tmp_path / 'theirs'}", "trainer.steps=1", "optim.lr=1e-30"]
    files = open_files(trained(ranks, tmp_path / "run", *start, *words))
    manifest = open_step(files)
    assert manifest.state["config"]["model"]["qk_norm"] == "head"
    for name, weight in weights.items():
        assert torch.equal(read_array(files, manifest, f"weight/{name}"), weight.float()), name


def test_it_is_the_same_run_as_from_an_import(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", tied=True)
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "imported")]) == 0
    direct = trained(1, tmp_path / "direct", f"resume=auto:hf:{tmp_path / 'theirs'}", "trainer.steps=2")
    through = trained(1, tmp_path / "through", f"resume={tmp_path / 'imported'}", "trainer.steps=2")
    assert not list(diff(open_files(direct), open_files(through)))
    again = trained(1, tmp_path / "direct", f"resume=auto:hf:{tmp_path / 'theirs'}", "trainer.steps=3")
    assert again.name == "step-00000003"


def test_each_rank_reads_what_it_holds(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "theirs", dim=64, heads=4, ffn_dim=96, vocabulary=512)
    total = sum(weight.nbytes for weight in weights.values())

    def held(rank: int) -> list[Fragment]:
        found: list[Fragment] = []
        for name, weight in weights.items():
            rows = weight.shape[0] // 4
            box = Box((rank * rows, *(0 for _ in weight.shape[1:])), (rows, *weight.shape[1:]))
            found.append(Fragment(name, "weight", tuple(weight.shape), box, torch.full(box.shape, torch.nan)))
        return found

    mine = [held(rank) for rank in range(4)]

    def body(control: Control) -> dict[str, int]:
        report = restore(f"hf:{tmp_path / 'theirs'}", mine[control.rank], control)
        return {"wanted": report.bytes_wanted, "read": report.bytes_read}

    for traffic in together(4, body):
        assert traffic["wanted"] == total // 4
        assert traffic["read"] < total // 4 + 8192 * len(weights)
    for fragments in mine:
        assert all(torch.equal(each.tensor, weights[each.name][each.box.slices()]) for each in fragments)


def test_a_key_that_contradicts_the_folder_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs")
    said = problems(f"resume=hf:{tmp_path / 'theirs'}", "model.rope_theta=7", "model.layers=3")
    assert "model.rope_theta: is 7" in said and "model.layers: is 3, and the checkpoint's model has 2" in said


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "the file is missing"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"{"), "it is cut off"),
    ],
)
def test_a_damaged_folder_is_refused_as_resume(tmp_path: Path, damage: Any, said: str) -> None:
    write_model(tmp_path / "theirs")
    damage(tmp_path / "theirs")
    found = problems(f"resume=hf:{tmp_path / 'theirs'}")
    assert "resume" in found and said in found


def test_a_head_that_is_tied_and_another_is_refused_on_all_ranks(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    words = [*WORDS, f"output_dir={tmp_path / 'run'}", f"resume=hf:{tmp_path / 'theirs'}", "trainer.steps=1"]
    with pytest.raises(AssertionError, match="tie_word_embeddings is true, but lm_head"):
        run_ranks(2, train, words)


def test_the_prefix_is_named_where_it_is_missing(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs")
    assert f"type resume=hf:{tmp_path / 'theirs'}" in problems(f"resume={tmp_path / 'theirs'}")


def test_the_run_remembers_the_model_s_family_and_tokenizer(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    write_model(theirs, vocabulary=257, kind="mistral")
    config = json.loads((theirs / "config.json").read_text())
    told = {"eos_token_id": [256, 7], "bos_token_id": 5, "max_position_embeddings": 4096}
    (theirs / "config.json").write_text(json.dumps(config | told))
    (theirs / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    (theirs / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.bytes().save(theirs / "tokenizer.json")
    (tmp_path / "text.jsonl").write_text('{"text": "a cabbage and a bee"}\n' * 50)
    words = ["data=jsonl", f"data.input={tmp_path / 'text.jsonl'}", "data.seq_len=16", f"data.cache_dir={tmp_path}"]
    trained(1, tmp_path / "run", *words, f"resume=hf:{theirs}", "trainer.steps=1")
    trained(1, tmp_path / "branch", *words, f"resume={tmp_path / 'run'}", "trainer.steps=2")
    assert main(["export", str(tmp_path / "branch"), str(tmp_path / "back")]) == 0
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert back["model_type"] == "mistral" and told.items() <= back.items()
    settings = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert settings["temperature"] == 0.6 and settings["eos_token_id"] == [256, 7]
    assert (tmp_path / "back/chat_template.jinja").read_text() == "{{ messages }}"
    assert Tokenizer.load(tmp_path / "back/tokenizer.json").fingerprint == Tokenizer.bytes().fingerprint
