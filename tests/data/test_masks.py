"""Loss masks: only an answer, or what the assistant says, carries loss. Chats are held to `apply_chat_template`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from meshloom.config.problems import ConfigError
from meshloom.data.batch import IGNORED
from meshloom.data.build import build_node
from meshloom.data.config import JsonlConfig
from meshloom.data.documents.chat import ChatTemplate
from meshloom.data.documents.marked import MarkedText, learned_tokens
from meshloom.data.node import DataNode
from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.data.validation_sets import ValidationSets

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "Wie geht's? <|im_end|>"}, {"role": "assistant", "content": " gut – Größe 😀."}],
    [
        *({"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2"}),
        *({"role": "assistant", "content": "4"}, {"role": "user", "content": "3+3"}, {"role": "assistant", "content": " 6"}),
    ],
]


def node(folder: Path, records: list[dict[str, Any]], **keys: Any) -> DataNode:
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    values: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 8, "validation": 0.0, "cache_dir": str(folder / "cache")}
    made = build_node(JsonlConfig(input=f"{folder}/data.jsonl", **{**values, **keys}), 1, None)
    assert made.problems() == []
    made.prepare()
    return made


def stored(made: DataNode) -> tuple[list[int], list[int]]:
    """All tokens that are read, and their targets, of the samples in the order in which they are stored."""
    samples = [made.stored[number] for number in range(len(made.stored))]  # type: ignore[attr-defined]
    tokens, targets = list[int](), list[int]()
    for each in samples:
        tokens += each.tokens.tolist()
        targets += each.targets.tolist()
    return tokens, targets


RECORDS = [{"question": "2+2=", "answer": "4."}, {"question": "name? ", "answer": "Ann"}, {"question": "", "answer": "lone"}]


@pytest.mark.parametrize("packing", ["concat", "bestfit"])
def test_a_prompt_carries_no_loss(tmp_path: Path, packing: str) -> None:
    made = node(tmp_path, RECORDS, prompt="question", field="answer", packing=packing, document_mask=packing == "bestfit")
    assert made.tokenizer is not None
    tokens, targets = stored(made)
    learned = [target for target in targets if target != IGNORED]
    end = made.tokenizer.end_of_document
    answers = [*b"4.", end, *b"Ann", end, *b"lone", end]
    if packing == "bestfit":
        assert sorted(learned) == sorted([*b"4.", end, *b"Ann", end, *b"one", end]), "the first token has nothing before it"
    else:
        whole = [*b"2+2=4.", end, *b"name? Ann", end, *b"lone", end]
        assert tokens == whole[: len(tokens)] and learned == answers[: len(learned)]


def test_a_record_without_a_prompt_learns_all_of_its_text(tmp_path: Path) -> None:
    made = node(tmp_path, RECORDS, field="answer")
    assert IGNORED not in stored(made)[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as of Hugging Face: a small BPE tokenizer with names of a chat, and a template."""
    from tokenizers import Tokenizer as Engine

    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(["the quick brown fox gut geht user assistant system 2+2 be brief"] * 4, 300).save(
        folder / "tokenizer.json"
    )
    engine = Engine.from_file(str(folder / "tokenizer.json"))
    engine.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    engine.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_the_assistants_tokens_are_those_that_transformers_marks(tmp_path: Path, tokenizer: Path) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(tokenizer)
    made = node(tmp_path, [{"chat": chat} for chat in CHATS], messages="chat", tokenizer=str(tokenizer), seq_len=1)
    assert made.tokenizer is not None
    tokens, learned = list[int](), list[int]()
    for chat in CHATS:
        found = other.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True, tokenize=True)
        tokens += [*found["input_ids"], made.tokenizer.end_of_document]
        learned += [*found["assistant_masks"], found["assistant_masks"][-1]]  # the document ends where the assistant does
    assert sum(learned) > 10
    read, targets = stored(made)
    assert read == tokens[:-1]
    assert targets == [token if mark else IGNORED for token, mark in zip(tokens[1:], learned[1:], strict=True)]


def test_masks_survive_the_split_and_named_sets(tmp_path: Path) -> None:
    """Too few documents to hold out whole ones: passages are held out, with their masks."""
    made = node(tmp_path, RECORDS * 3, prompt="question", field="answer", validation=0.3, seq_len=2)
    assert {target == IGNORED for target in stored(made)[1]} == {True, False}
    shards = made.validation_shards  # type: ignore[attr-defined]
    assert shards is not None and shards.masked
    (tmp_path / "set.jsonl").write_text(json.dumps({"q": "ab", "a": "cd"}) + "\n")
    mine = {"_target_": "meshloom.data.nodes.Jsonl", "input": f"{tmp_path}/set.jsonl", "prompt": "q", "field": "a"}
    config = JsonlConfig(seq_len=8, cache_dir=str(tmp_path / "cache"))
    (part,) = ValidationSets({"qa": mine}, config, 1).parts(made)
    assert made.tokenizer is not None
    assert part.samples[0].targets.tolist() == [IGNORED, *b"cd", made.tokenizer.end_of_document, *[IGNORED] * 4]


def test_records_that_are_no_conversation_are_named(tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"line 2: is no conversation of this chat template"):
        node(tmp_path, [{"chat": CHATS[0]}, {"chat": [5]}], messages="chat", tokenizer=str(tokenizer))


def test_templates_that_mark_nothing_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    bare = tmp_path / "bare"
    bare.mkdir()
    Tokenizer.bytes().save(bare / "tokenizer.json")
    keys: dict[str, Any] = {"messages": "chat", "input": f"{tokenizer}/tokenizer.json", "tokenizer": str(tokenizer)}

    def problems(**more: Any) -> list[str]:
        found = build_node(JsonlConfig(**{**keys, **more}), 1, None).problems()
        return [str(problem) for problem in found if problem.key != "data.input"]

    (plain,) = problems(chat_template=f"{tmp_path}/plain.jinja")
    assert plain.startswith("data.chat_template: it does not mark what the assistant says")
    (none,) = problems(tokenizer=f"{bare}/tokenizer.json")
    assert none.startswith("data.chat_template: there is no chat template")
    assert any("data.prompt" in text for text in problems(prompt="question"))


@pytest.mark.parametrize("made", ["bpe", "bytes"])
def test_the_current_folder_is_beside_no_made_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    settings = {"bos_token": "<stray>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "data.jsonl").write_text(json.dumps({"chat": CHATS[0]}))
    keys: dict[str, Any] = {"messages": "chat", "input": f"{tmp_path}/data.jsonl", "tokenizer": made}
    (problem,) = build_node(JsonlConfig(**keys), 1, None).problems()
    assert problem.key == "data.messages" and "has no chat template" in problem.message
    assert build_node(JsonlConfig(**keys, chat_template="chat_template.jinja"), 1, None).problems() == []
    assert ChatTemplate.find("chat_template.jinja", made) == ChatTemplate(TEMPLATE, {}), "no name of a stray tokenizer"


@pytest.mark.parametrize("text", ['{"bos_token": "<s', '["<s>"]'])
def test_settings_of_a_tokenizer_that_cannot_be_read_are_no_missing_ones(tmp_path: Path, text: str) -> None:
    """Texts would begin without the model's first token."""
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: '.*tokenizer_config\.json' can't be read"):
        ChatTemplate.find(None, str(tmp_path))


def test_tokens_that_end_inside_a_span_are_learned() -> None:
    """Drawn spans in order, some that touch, beside what the words say."""
    draw = random.Random(3)
    for _ in range(200):
        cuts = sorted(draw.sample(range(60), 2 * draw.randrange(5)))
        spans = list(zip(cuts[::2], cuts[1::2], strict=True))
        ends = sorted(draw.choices(range(61), k=20))
        offsets = list(zip([0, *ends[:-1]], ends, strict=True))
        expected = [any(start < end <= stop for start, stop in spans) for end in ends]
        learned = learned_tokens(MarkedText("x" * 60, spans), offsets)
        assert learned.tolist() == [*expected, bool(spans) and spans[-1][1] == 60]


def test_documents_are_encoded_together_as_alone(tokenizer: Path) -> None:
    made = Tokenizer.load(tokenizer)
    words = ("Größe 😀 <|im_end|> gut", "", "the quick", "naïve – fox", "<s>user")
    texts = [MarkedText(text, [(1, len(text))], specials=at in (1, 2, 4)) for at, text in enumerate(words)]
    together = made.encode_marked(texts)
    for text, (tokens, learned) in zip(texts, together, strict=True):
        ((alone, marks),) = made.encode_marked([text])
        assert tokens.tolist() == alone.tolist() and learned.tolist() == marks.tolist()
    assert together[0][0].tolist()[:-1] == made.encode(str(texts[0])), "the name of a special token is text here"
    assert len(together[4][0]) < len(made.encode(str(texts[4]))), "and stands for it here"
