"""Evaluation of a checkpoint: the run's own numbers on any layout, and transformers' on a model folder of Hugging Face."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.data.batch import Sample
from meshloom.data.samples.order import ValidationSamples
from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.launch.evaluate import main, read_arguments, resolve_evaluation
from meshloom.trainer import evaluate as evaluate_module
from meshloom.trainer.evaluate import AT_ONCE, batches_of, evaluate, perplexity
from support.hf_folder import write_model
from support.ranks import run_ranks
from support.tiny_run import ANY_DATA, TINY, body

TEXT = "Füße tragen den schnellen braunen Fuchs über den faulen Hund. "


def evaluated(rank: int, world_size: int, words: list[str]) -> dict[str, Any]:
    """`meshloom evaluate` with these words, on ranks that are there already, each with one micro-batch at a time.

    It reads each sample of each part once at most.
    """
    arguments = read_arguments([*words, f"launch.nproc={world_size}"])
    read: list[tuple[int, int]] = []
    get = ValidationSamples.__getitem__

    def counted(samples: ValidationSamples, index: int) -> Sample:
        read.append((id(samples), index))
        return get(samples, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "AT_ONCE", 1)
        patch.setattr(ValidationSamples, "__getitem__", counted)
        found = evaluate(resolve_evaluation(arguments), whole=arguments.whole).as_json()
    assert len(set(read)) == len(read), "a sample was read twice"
    return found


def commanded(rank: int, world_size: int, words: list[str]) -> int:
    return main([*words, "launch.nproc=1"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text with a named set, which has evaluated itself at its end."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "train.txt").write_text(TEXT * 40)
    (folder / "wiki.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    words = [
        *ANY_DATA,
        *("data=text", f"data.input={folder}/train.txt", "data.tokenizer=bytes", "data.seq_len=16", "data.validation=0.2"),
        *(f"data.cache_dir={folder}/cache", "trainer.steps=3", "trainer.eval_every=null", f"output_dir={folder}/run"),
        f"validation={{wiki: {{_target_: meshloom.data.nodes.Text, input: {folder}/wiki.txt}}}}",
    ]
    assert run_ranks(1, body, words) == [0]
    return folder


def own_row(run: Path) -> dict[str, Any]:
    """Return what the run has measured itself."""
    rows = [json.loads(line) for line in (run / "run/metrics.jsonl").read_text().splitlines()]
    return next(row for row in reversed(rows) if "eval_loss" in row)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ["parallel.zero=1"]),
        (2, ["parallel.zero=3"]),
        (2, ["parallel.tp=2"]),
        (2, ["parallel.pp=2", "batch.micro=1"]),
        (2, ["parallel.cp=2", "data.document_mask=false"]),
    ],
)
def test_it_finds_the_run_s_own_losses_on_any_layout(run: Path, ranks: int, words: list[str]) -> None:
    row = own_row(run)
    found = run_ranks(ranks, evaluated, [f"checkpoint={run}/run", f"data.cache_dir={run}/cache", *words])
    assert all(each == found[0] for each in found), "the ranks differ"
    result = found[0]
    assert result["step"] == 3 and result["sources"].keys() == {"data", "wiki"}
    assert result["loss"] == pytest.approx(row["eval_loss"], rel=1e-9) == result["sources"]["data"]["loss"]
    wiki = result["sources"]["wiki"]
    assert wiki["loss"] == pytest.approx(row["validation/wiki/loss"], rel=1e-9)
    assert wiki["tokens"] == 160 and wiki["bytes"] <= 160 and wiki["weight"] == 0
    assert result["perplexity"] == math.exp(result["loss"])


def test_other_text_is_cut_by_the_model_s_tokenizer(run: Path) -> None:
    """And all of it is evaluated where that is asked for. Every token but the ends of documents is one byte."""
    words = [f"checkpoint={run}/run", "data=text", f"data.input={run}/wiki.txt", "data.validation=0.5", "samples=all"]
    resolved = resolve_evaluation(read_arguments([*words, "launch.nproc=1"]))
    assert resolved.config.data.tokenizer == "bytes", "the run's own setting"
    (result,) = run_ranks(1, evaluated, [*words, f"data.cache_dir={run}/cache", "data.tokenizer=bpe"])
    (source,) = (each for name, each in result["sources"].items() if name == "data")
    assert source["samples"] > 10 and source["tokens"] - source["bytes"] in (0, 1)
    bits = source["loss"] * source["tokens"] / source["bytes"] / math.log(2)
    assert source["bits_per_byte"] == pytest.approx(bits)


def test_a_hugging_face_model_has_transformers_losses(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'meshloom[hf]'")
    write_model(tmp_path / "theirs", vocabulary=257)
    Tokenizer.bytes().save(tmp_path / "theirs/tokenizer.json")
    text = TEXT * 8
    (tmp_path / "held.txt").write_text(text)
    words = [
        *(f"checkpoint=hf:{tmp_path}/theirs", "data=text", f"data.input={tmp_path}/held.txt", "data.seq_len=32"),
        *("data.validation=0", f"data.cache_dir={tmp_path}/cache", "precision=fp32", "samples=all"),
        f"validation={{held: {{_target_: meshloom.data.nodes.Text, input: {tmp_path}/held.txt}}}}",
    ]
    (result,) = run_ranks(1, evaluated, words)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    tokens = torch.tensor([*text.encode()])[:513]  # 16 whole samples, and the token behind the last
    inputs, targets = tokens[:-1].split(32), tokens[1:].split(32)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(theirs(one[None]).logits[0], two, reduction="sum")
            for one, two in zip(inputs, targets, strict=True)
        ]
    held, total = result["sources"]["held"], float(torch.stack(losses).sum())
    assert held["tokens"] == held["bytes"] == 512
    assert held["loss"] == pytest.approx(total / held["tokens"], rel=1e-5)
    assert held["bits_per_byte"] == pytest.approx(total / math.log(2) / held["bytes"], rel=1e-5)
    assert result["loss"] == held["loss"] and result["bits_per_byte"] == pytest.approx(held["bits_per_byte"])


def test_the_command_prints_a_table_or_json(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"checkpoint={run}/run", f"data.cache_dir={run}/cache", "samples=4", f"--output={run}/found.json"]
    assert run_ranks(1, commanded, words) == [0]
    head, titles, *rows = capfd.readouterr().out.splitlines()
    assert head.endswith("step-00000003: step 3, fp64, one process") and titles.endswith("bits per byte")
    assert [row.split()[:3] for row in rows[:2]] == [["data", "1", "4"], ["wiki", "apart", "4"]]
    written = json.loads((run / "found.json").read_text())
    assert run_ranks(1, commanded, [*words[:3], "--json", "logging.progress=true"]) == [0]
    output = capfd.readouterr()
    assert json.loads(output.out) == written and "evaluating 8 samples" in output.err
    assert rows[2].split() == ["mean", *(f"{written[name]:.4f}" for name in ("loss", "perplexity", "bits_per_byte"))]


def test_tokens_without_text_have_no_bits_per_byte(tmp_path: Path) -> None:
    assert run_ranks(1, body, [*TINY, "trainer.steps=3", f"output_dir={tmp_path}"]) == [0]
    (result,) = run_ranks(1, evaluated, [f"checkpoint={tmp_path}"])
    assert result["bits_per_byte"] is None and result["sources"]["data"]["bytes"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "checkpoint: is not given"),
        (["checkpoint=gone"], "'gone' holds no complete checkpoint"),
        (["checkpoint=RUN", "samples=0"], "samples: '0' is no number"),
        (["checkpoint=RUN", "resume=auto"], "resume: nothing is resumed"),
        (["checkpoint=RUN", "data.sequence=4"], "data.sequence"),
        (["checkpoint=RUN", "parallel.tp=3", "launch.nproc=3"], "parallel.tp"),
        (["checkpoint=hf:HF"], "does not say what to evaluate it on"),
    ],
)
def test_an_impossible_evaluation_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    write_model(tmp_path / "theirs", vocabulary=257)
    places = {"RUN": f"{run}/run", "HF": f"{tmp_path}/theirs"}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_another_tokenizer_is_refused(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"checkpoint={run}/run", f"data.cache_dir={run}/cache", "data.tokenizer=bpe", "data.vocabulary=257"]
    Tokenizer.train([TEXT], 257).save(run / "other.json")
    assert run_ranks(1, commanded, [*words[:2], f"data.tokenizer={run}/other.json"]) == [2]
    assert "the text is cut into other tokens" in capfd.readouterr().err


def test_perplexity_of_no_loss_is_none() -> None:
    assert perplexity(None) is None and perplexity(1e4) is None and perplexity(math.nan) is None and perplexity(0.0) == 1.0


@pytest.mark.parametrize("count", [0, 1, 7, 8, 8 * AT_ONCE, 8 * AT_ONCE + 1, 8 * 3 * AT_ONCE - 5, 12_345])
def test_few_samples_are_in_memory_in_the_same_micro_batches(count: int) -> None:
    batches = list(batches_of(count, 8))
    assert [index for batch in batches for index in batch.indices()] == list(range(count))
    assert all(0 < batch.count <= 8 * AT_ONCE for batch in batches) and all(batch.first % 8 == 0 for batch in batches)
    assert len(batches) < 2 or batches[-1].count > 8, "a last batch of other rows would be compiled anew"
