"""`meshloom generate` on checkpoints that are whole, damaged, imported, or of data without text."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import pytest
import torch

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.data.tokenizing.tokenizer import END_OF_DOCUMENT, Tokenizer
from meshloom.launch.generate import main
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.hf_folder import write_model
from support.models import decoder

SHAPE = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn_dim": 24, "vocabulary": Tokenizer.bytes().vocabulary}
MODEL = {"_target_": "meshloom.models.decoder.Decoder", "name": "llama", **SHAPE}


def saved(folder: Path, state: dict[str, object]) -> Path:
    """A checkpoint of a small model that always goes on with one token. Returns the step's folder."""
    model = decoder(**SHAPE)
    fragments = [
        Fragment(name, "weight", tuple(weight.shape), Box.whole(weight.shape), torch.full_like(weight, 0.01).detach())
        for name, weight in model.named_parameters()
    ]
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync"))
    checkpointer.save(3, fragments, state)
    checkpointer.finish()
    return folder / "step-00000003"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_an_imported_model_goes_on_when_it_has_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = saved(tmp_path / "imported", {"config": {"model": MODEL}, "imported_from": {"format": "hugging_face"}})
    words = (f"checkpoint={tmp_path / 'imported'}", "prompt=def ", "tokens=3", "temperature=0")
    assert "does not say how far its model looks back; give" in said(capsys, *words)[2]
    assert "was imported without a tokenizer; put the model's tokenizer.json" in said(capsys, *words, "context=8")[2]
    Tokenizer.bytes().save(step.parent / "tokenizer.json")
    code, text, _ = said(capsys, *words, "context=8")
    assert code == 0 and text.startswith("def ")


def test_a_folder_of_hugging_face_s_goes_on_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "theirs", vocabulary=257)
    Tokenizer.bytes().save(tmp_path / "theirs/tokenizer.json")
    words = (f"checkpoint=hf:{tmp_path / 'theirs'}", "prompt=def ", "tokens=3", "temperature=0", "context=16")
    code, text, error = said(capsys, *words)
    assert code == 0 and text.startswith("def "), error


def test_the_end_of_a_document_is_the_one_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of shards only the checkpoint knows it: their config has no such key."""
    data = {"_target_": "meshloom.data.nodes.Tokenized", "name": "shards", "seq_len": 8, "path": "elsewhere"}
    state = {"config": {"model": MODEL, "data": data}, "end_of_document": 256}
    step = saved(tmp_path / "run", state)
    Tokenizer.bytes().save(step.parent / "tokenizer.json")
    named = (step.parent / "tokenizer.json").read_text().replace(END_OF_DOCUMENT, "[DONE]")
    (step.parent / "tokenizer.json").write_text(named)
    code, text, error = said(capsys, f"checkpoint={step}", "prompt=def ", "tokens=3", "temperature=0")
    assert code == 0 and text.startswith("def "), error


def test_a_model_of_which_something_is_missing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights would be whatever the memory held before."""
    Tokenizer.bytes().save(tmp_path / "tokenizer.json")
    saved(tmp_path, {"config": {"model": {**MODEL, "ffn_dim": 64}}, "imported_from": {}})
    code, out, error = said(capsys, f"checkpoint={tmp_path}", "context=8")
    assert code == 1 and not out
    assert "does not have this model's weight/layers.0.ffn.w" in error


def test_an_import_without_a_model_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, {"imported_from": {"format": "deepspeed zero 2"}})
    code, _, error = said(capsys, f"checkpoint={tmp_path}")
    assert code == 2 and "don't say what model" in error


def test_a_damaged_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Tokenizer.bytes().save(tmp_path / "tokenizer.json")
    step = saved(tmp_path, {"config": {"model": MODEL}, "imported_from": {}})
    (array,) = step.glob("*.safetensors")
    array.write_bytes(array.read_bytes()[:100])
    code, _, error = said(capsys, f"checkpoint={step}", "context=8")
    assert code == 1 and error.startswith("meshloom generate: ") and array.name in error and "Traceback" not in error
    (step / "manifest.json").write_text("{")
    code, _, error = said(capsys, f"checkpoint={step}", "context=8")
    assert code == 1 and "manifest.json" in error


def test_a_run_whose_data_and_tokenizer_are_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"_target_": "meshloom.data.nodes.Text", "name": "text", "input": "gone.txt", "seq_len": 8}
    saved(tmp_path, {"config": {"model": MODEL, "data": {**data, "cache_dir": str(tmp_path / "cache")}, "seed": 1}})
    code, _, error = said(capsys, f"checkpoint={tmp_path}")
    assert code == 2 and "put the model's tokenizer.json beside the checkpoint" in error
    assert "data.input: 'gone.txt' matches no file" in error
    assert not (tmp_path / "cache").exists()


def test_a_run_whose_data_can_not_even_be_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"_target_": "meshloom.data.nodes.Text", "name": "text", "input": "a" * 300, "seq_len": 8}
    saved(tmp_path, {"config": {"model": MODEL, "data": {**data, "cache_dir": str(tmp_path / "cache")}, "seed": 1}})
    code, _, error = said(capsys, f"checkpoint={tmp_path}")
    assert code == 2 and "put the model's tokenizer.json beside the checkpoint" in error
    assert "data: aaa" in error and "File name too long" in error


def test_a_tokenizer_that_can_not_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = saved(tmp_path, {"config": {"model": MODEL}, "imported_from": {}})
    Tokenizer.bytes().save(step.parent / "tokenizer.json")

    def refuse(path: Path, *_: object) -> Tokenizer:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Tokenizer, "load", refuse)
    code, _, error = said(capsys, f"checkpoint={tmp_path}", "context=8")
    assert code == 2 and "Permission denied" in error and "tokenizer.json" in error


@pytest.mark.parametrize("word", ["temperature=nan", "temperature=-1", "seed=-1", f"seed={2**64}", "top_k=0", "tokens=0"])
def test_numbers_that_can_not_be_are_refused(capsys: pytest.CaptureFixture[str], word: str) -> None:
    code, _, error = said(capsys, "checkpoint=any", word)
    assert code == 2 and f"- {word.partition('=')[0]}: " in error


def test_a_file_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, _, error = said(capsys, f"checkpoint={tmp_path / 'file'}")
    assert code == 2 and "checkpoint: " in error


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "theirs", vocabulary=257)
    Tokenizer.bytes().save(tmp_path / "theirs/tokenizer.json")
    return tmp_path / "theirs"


def test_prompts_of_words_and_of_a_file_and_samples(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "prompts.txt").write_text("two\nthree\n")
    words = (f"checkpoint=hf:{model}", "context=32", "tokens=3", f"prompts={model}/prompts.txt", "prompt=one", "samples=2")
    code, text, error = said(capsys, *words)
    assert code == 0, error
    heads = [line for line in text.splitlines() if line.startswith("---")]
    assert heads == [f"--- prompt {prompt}, sample {sample}" for prompt in (1, 2, 3) for sample in (1, 2)]
    assert said(capsys, *words, f"output={model}/found.jsonl", "batch=4")[:2] == (0, "")
    rows = [json.loads(line) for line in (model / "found.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [(one, two) for one in ("one", "two", "three") for two in (1, 2)]
    for row in rows:
        assert row["prompt"] + row["text"] in text, "batches change no text"
        assert row["tokens"] <= 3 and row["ended"] in ("end", "length")


def test_a_conversation_goes_through_the_chat_template(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the extra: pip install 'meshloom[hf]'")
    words = (f"checkpoint=hf:{model}", "context=200", "tokens=3", "chat=true")
    assert "no chat template" in said(capsys, *words, "prompt=hi")[2]
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"
    (model / "chat_template.jinja").write_text(template)
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_DOCUMENT}))
    seen: list[str] = []

    def encode(self: Tokenizer, text: str, *, specials: bool = False) -> list[int]:
        seen.append(text)
        assert specials and plain(self, text, specials=True).count(self.end_of_document) == text.count(END_OF_DOCUMENT)
        return plain(self, text, specials=True)

    plain = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", encode)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nho\n"))
    code, text, error = said(capsys, *words, "interactive=true")
    first, end = text.splitlines()[0], END_OF_DOCUMENT
    assert code == 0 and seen[0] == f"<user>hi{end}<assistant>", error
    assert seen[1].startswith(f"<user>hi{end}<assistant>{first[:1]}") and seen[1].endswith(f"{end}<user>ho{end}<assistant>")
    (model / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hey"}]}) + "\n")
    assert said(capsys, *words, f"prompts={model}/chats.jsonl")[0] == 0 and seen[2] == f"<user>hey{end}<assistant>"
    assert "messages need chat=true" in said(capsys, *words[:3], f"prompts={model}/chats.jsonl")[2]


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("top_p=0", "top_p"),
        ("min_p=2", "min_p"),
        ("samples=0", "samples"),
        ("batch=0", "batch"),
        ("stop=", "stop"),
        ("prompts=gone.txt", "prompts"),
    ],
)
def test_impossible_drawing_is_refused(capsys: pytest.CaptureFixture[str], word: str, key: str) -> None:
    code, _, error = said(capsys, "checkpoint=any", word)
    assert code == 2 and f"- {key}: " in error
    assert "- interactive: " in said(capsys, "checkpoint=any", "interactive=true", "prompt=a")[2]
