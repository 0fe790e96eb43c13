"""Scores of continuations, and lm-eval on local tasks: the same as its own model for transformers finds on the same folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.launch.evaluate import main, read_arguments, resolve_evaluation
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.trainer.tasks.scoring import Continuation, deal_by_cost, passes_of, score
from support.hf_folder import SIZES, write_model
from support.ranks import run_ranks
from support.tiny_run import body

QUESTIONS = [
    {"question": "The quick brown fox jumps over the lazy", "choices": [" dog", " cat and mouse", " x"], "gold": 0},
    {"question": "Füße tragen den", "choices": [" schnellen", " Hund", " faulen Fuchs"], "gold": 2},
    {"question": "One two", "choices": [" three", " four", " one"], "gold": 0},
    {"question": "A b c d e f g h i j k l m n o p q r s", "choices": [" t", " u", " a longer answer"], "gold": 1},
]
CONTEXT = 48
RULES = {"until": ["e", "\n"], "max_gen_toks": 8, "do_sample": False}
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
num_fewshot: 1
fewshot_split: test
fewshot_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm}, {metric: brier_score}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} and so on until the sun goes down behind the hills: {{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "said": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig.of(SIZES)).double()


@torch.no_grad()
def test_scores_are_those_of_each_request_by_itself() -> None:
    """Against log_softmax of one row at a time; requests of one context and one token share a row; long ones are cut."""
    decoder, generator = model(), torch.Generator().manual_seed(1)
    tokens = torch.randint(61, (60,), generator=generator).tolist()
    sizes = [(3, 2), (9, 1), (9, 1), (20, 4), (1, 1), (6, 6)]
    requests = [Continuation(tokens[:before], tokens[40 + at : 40 + at + after]) for at, (before, after) in enumerate(sizes)]
    row = torch.tensor([tokens[:4]])
    likeliest = int(decoder(row)[0, -1].argmax())
    requests.append(Continuation(tokens[:4], [likeliest]))
    found = dict(score(decoder, requests, context=12))
    shared = dict([*score(decoder, requests, 12, rank=0, ranks=2), *score(decoder, requests, 12, rank=1, ranks=2)])
    assert shared.keys() == found.keys() == set(range(7))
    for number, one in shared.items():
        assert one.log_likelihood == pytest.approx(found[number].log_likelihood, rel=1e-12)
        assert one.greedy == found[number].greedy
    for number, request in enumerate(requests):
        whole = torch.tensor([*request.context, *request.tokens])[-13:]
        logs_SV = torch.log_softmax(decoder(whole[None, :-1])[0], -1)[-len(request.tokens) :]
        targets = whole[-len(request.tokens) :]
        assert found[number].log_likelihood == pytest.approx(float(logs_SV.gather(1, targets[:, None]).sum()), rel=1e-12)
        assert found[number].greedy == bool((logs_SV.argmax(-1) == targets).all())
    assert found[6].greedy


def test_rows_are_sorted_and_shared() -> None:
    requests = [Continuation([1, 2], [3]), Continuation([5] * 9, [1]), Continuation([1, 2], [4]), Continuation([1], [2, 9])]
    passes = passes_of(requests, context=8, positions=8)
    assert [[(len(row.tokens), row.numbers) for row in rows] for rows in passes] == [[(8, [1])], [(2, [0, 2, 3])]]
    alike = [Continuation([1, 2, 3], [number]) for number in range(3)] + [
        Continuation([4, 5, number], [1]) for number in range(3)
    ]
    assert [len(rows) for rows in passes_of(alike, 8, 1 << 14)] == [4]
    assert [len(rows) for rows in passes_of(alike, 8, 1 << 14, ranks=2)] == [2, 2], "each of two ranks has something to do"
    assert deal_by_cost([9, 5, 4, 4, 1], 2) == [[0, 3], [1, 2, 4]]
    with pytest.raises(ValueError, match="3 tokens is longer than the context of 2"):
        passes_of([Continuation([1], [1, 2, 3])], 2, 8)


def answers(rank: int, world_size: int, folder: str, contexts: list[str]) -> list[str]:
    """Return what the model says behind contexts, and then the score of the first: generation leaves no cache behind."""
    from lm_eval.api.instance import Instance

    from meshloom.parallel.config import ParallelConfig
    from meshloom.parallel.layout import Layout
    from meshloom.parallel.mesh import Mesh
    from meshloom.trainer.tasks.language_model import LanguageModel
    from meshloom.trainer.whole_model import load_whole_model

    mesh = Mesh.connect(Layout.plan(ParallelConfig(), world_size), torch.device("cpu"))
    decoder = Decoder(DecoderConfig.of({**SIZES, "vocabulary": 257}))
    whole = load_whole_model(decoder.to("meta"), f"hf:{folder}/model", torch.device("cpu"), torch.float32)
    seen = LanguageModel(whole, Tokenizer.bytes(), CONTEXT, mesh)
    pair = [Instance("loglikelihood", {}, (contexts[0], " and"), 0)]
    before = seen.loglikelihood(pair)
    said = seen.generate_until([Instance("generate_until", {}, (text, dict(RULES)), 0) for text in contexts])
    assert seen.loglikelihood(pair) == before
    mesh.close()
    return said


def evaluated(rank: int, world_size: int, words: list[str]) -> dict[str, Any]:
    from meshloom.trainer.tasks.on_checkpoint import evaluate_tasks

    arguments = read_arguments([*words, f"launch.nproc={world_size}"])
    assert arguments.context is not None
    return evaluate_tasks(resolve_evaluation(arguments), arguments.context).as_json()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, and a model of Hugging Face's."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    for name, text in TASKS.items():
        (place / f"{name}.yaml").write_text(f"task: {name}" + COMMON.format(file=place / "questions.jsonl") + text)
    write_model(place / "model", vocabulary=257)
    Tokenizer.bytes().save(place / "model/tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (place / "model/tokenizer_config.json").write_text(json.dumps(settings))
    return place


def test_lm_eval_finds_what_it_finds_with_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few-shot choices with contexts that are cut, perplexity in windows, generation; on one process and on two."""
    pytest.importorskip("lm_eval", reason="needs the extra: pip install 'meshloom[lm_eval]'")
    for theirs in ("transformers", "accelerate", "peft"):
        pytest.importorskip(theirs, reason="needs lm-eval's own model: pip install 'lm_eval[hf]'")
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", f"{folder}/cache")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    own = HFLM(pretrained=f"{folder}/model", device="cpu", dtype="float32", max_length=CONTEXT, batch_size=2)
    contexts = [each["question"] for each in QUESTIONS] + ["a longer text that loses its beginning, word by word by word"]
    said = own.generate_until([Instance("generate_until", {}, (text, dict(RULES)), 0) for text in contexts])
    assert len(set(said)) > 2 and run_ranks(2, answers, str(folder), contexts) == [said, said]
    told = simple_evaluate(own, tasks=list(TASKS), task_manager=manager)
    assert told is not None
    words = [f"checkpoint=hf:{folder}/model", f"tasks={','.join(TASKS)}", f"tasks.folder={folder}", f"context={CONTEXT}"]
    for ranks in (1, 2):
        for found in run_ranks(ranks, evaluated, [*words, "precision=fp32"]):
            assert found["tasks"].keys() == set(TASKS) and found["processes"] == ranks
            for task, values in found["tasks"].items():
                assert values
                for each in values:
                    expected = told["results"][task][f"{each['metric']},{each['filter']}"]
                    assert each["value"] == pytest.approx(expected, rel=1e-5), (task, each)


def test_a_run_evaluates_itself_as_its_checkpoint_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its steps and at its end, under ZeRO-3, with the token that begins a text; a run whose data has no text is refused."""
    pytest.importorskip("lm_eval", reason="needs the extra: pip install 'meshloom[lm_eval]'")
    monkeypatch.setenv("HF_HOME", f"{folder}/cache")
    (folder / "train.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    tasks = ["tasks.names=[choice,rolling,said]", f"tasks.folder={folder}", "tasks.every=2", "tasks.limit=3"]
    (folder / "begun").mkdir()
    Tokenizer.bytes().save(folder / "begun/tokenizer.json")
    (folder / "begun/tokenizer_config.json").write_text(json.dumps({"bos_token": "A"}))
    words = [*text_run(folder, f"{folder}/begun"), "data.seq_len=48", "trainer.steps=3", f"output_dir={folder}/run"]
    assert run_ranks(2, body, [*words, *tasks, "parallel.zero=3"]) == [0, 0]
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    told = {row["step"]: row for row in rows if "tasks/choice/acc" in row}
    assert told.keys() == {2, 3}
    for step, row in told.items():
        place = f"checkpoint={folder}/run/checkpoints/step-{step:08d}"
        (found,) = run_ranks(
            1, evaluated, [place, "tasks=choice,rolling,said", f"tasks.folder={folder}", "tasks.limit=3", "context=48"]
        )
        values = {f"tasks/{task}/{each['metric']}": each["value"] for task, all in found["tasks"].items() for each in all}
        assert {name: value for name, value in row.items() if name.startswith("tasks/")} == pytest.approx(values, rel=1e-9)
    with pytest.raises(AssertionError, match=r"tasks.names: tasks are text"):
        run_ranks(1, body, [*tasks, f"output_dir={folder}/other"])
    with pytest.raises(
        AssertionError, match=r"tasks.names: 'choice': a continuation of 14 tokens is longer than the context of 8"
    ):
        run_ranks(1, body, [*text_run(folder, "bytes"), *tasks, "data.seq_len=8", f"output_dir={folder}/other"])


def text_run(folder: Path, tokenizer: str) -> list[str]:
    """Words of a run on a text."""
    words = ["data=text", f"data.input={folder}/train.txt", f"data.tokenizer={tokenizer}", "data.validation=0"]
    return [*words, f"data.cache_dir={folder}/cache", "checkpoint.every=2"]


def failing_on_rank_1(rank: int, world_size: int, words: list[str]) -> tuple[int, list[str]]:
    """Train; lm-eval fails on rank 1 behind the start's checks, while rank 0 goes on to the model's own collectives.

    Returns the exit code, and what is warned of.
    """
    from meshloom.trainer.tasks.language_model import LanguageModel

    encode = LanguageModel._encode_pair

    def encode_or_fail(self: Any, context: str, continuation: str) -> Any:
        if rank == 1 and not next(self._model.parameters()).is_meta:
            raise MemoryError("no memory is left")
        return encode(self, context, continuation)

    LanguageModel._encode_pair = encode_or_fail  # in this forked process alone
    warnings, handler = list[str](), logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("meshloom").addHandler(handler)
    return body(rank, world_size, words), warnings


def test_a_run_outlives_its_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval that fails on one rank at the last step: both say so and go on, and the last checkpoint is there."""
    pytest.importorskip("lm_eval", reason="needs the extra: pip install 'meshloom[lm_eval]'")
    monkeypatch.setenv("HF_HOME", f"{folder}/cache")
    (folder / "train.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    tasks = ["tasks.names=[choice]", f"tasks.folder={folder}", "tasks.limit=3"]
    words = [*text_run(folder, "bytes"), *tasks, "data.seq_len=48", "trainer.steps=2", f"output_dir={folder}/failed"]
    (code, warnings), other = run_ranks(2, failing_on_rank_1, words)
    assert code == 0 and other == (0, [])
    assert any("step 2: the evaluation on tasks failed on rank 1, and the run goes on" in warning for warning in warnings)
    assert (folder / "failed/checkpoints/step-00000002").is_dir()
    assert "tasks/choice" not in (folder / "failed/metrics.jsonl").read_text()


def test_examples_are_the_same_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra: pip install 'meshloom[lm_eval]'")
    from meshloom.trainer.tasks.config import TasksConfig
    from meshloom.trainer.tasks.evaluation import Tasks

    monkeypatch.setenv("HF_HOME", f"{folder}/cache")
    tasks, seen = Tasks.load(TasksConfig(names=["choice"], folder=str(folder), few_shot=2)), list[list[str]]()

    class Recorder:
        def check(self, requests: Any) -> None:
            seen.append([request.args[0] for request in requests])

    for _ in range(3):
        tasks.check(Recorder())  # type: ignore[arg-type]
    assert seen[0] == seen[1] == seen[2] and len(set(seen[0])) == len(QUESTIONS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tasks="], "tasks: names no task"),
        (["tasks=choice", "samples=4"], "samples: has no meaning for tasks"),
        (["tasks=choice", "tasks.names=[said]"], "tasks.names: is of a run; write tasks="),
        (["tasks.limit=3"], "tasks.limit: has no meaning without tasks"),
        (["context=4"], "context: has no meaning without tasks"),
        (["tasks=choice", "context=0"], "context: '0' is no number of tokens"),
        (["tasks=choice"], "does not say how far its model looks back"),
        (["tasks=choice", "context=48", "tasks.limit=0"], "tasks.limit: 0 leaves no question"),
        (["tasks=choice", "context=48", 'tasks.folder="~nosuch/tasks"'], "tasks.folder: there is no folder '~nosuch/tasks'"),
        (["tasks=choice", "context=48", "--output=gone/found.json"], "--output: 'gone/found.json' can't be written"),
    ],
)
def test_a_run_that_suits_no_task_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main([f"checkpoint=hf:{folder}/model", *words]) == 2
    assert said in capsys.readouterr().err


def test_unknown_tasks_are_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra: pip install 'meshloom[lm_eval]'")
    from meshloom.config.problems import ConfigError
    from meshloom.trainer.tasks.config import TasksConfig
    from meshloom.trainer.tasks.evaluation import Tasks

    (folder / "broken.yaml").write_text(
        (folder / "said.yaml").read_text().replace("questions", "gone").replace("said", "broken")
    )
    with pytest.raises(ConfigError, match="a task can't be loaded"):
        Tasks.load(TasksConfig(names=["broken"], folder=str(folder)))
