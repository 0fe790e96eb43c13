"""The model interface of lm-eval: each answer is that of the request by itself, on one process and on two.

Where lm-eval is not installed, a stand-in of its shape calls the interface (`support/stand_in_harness.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.trainer import tasks
from meshloom.trainer.generation import Sampling, generate_texts
from support.hf_folder import SIZES
from support.ranks import run_ranks
from support.stand_in_harness import harness

CONTEXT = 16
PAIRS = [
    ("One two", " three"),
    ("", "no context"),
    ("a context that is longer than what the model reads ", "and more"),  # whose space belongs to what is scored
    ("x", "y"),
]
TEXTS = ["short", "a text of more than two windows, each token of which is scored once", "Füße"]
PROMPTS = ["a", "the quick brown fox jumps over", "bc"]
RULES = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
Answers = tuple[list[tuple[float, bool]], list[float], list[str]]


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig.of({**SIZES, "vocabulary": 257})).double()


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left() -> Iterator[None]:
    """Later tests of the process find no interface that is built on the stand-in."""
    yield
    assert "meshloom.trainer.tasks.language_model" not in sys.modules and "language_model" not in vars(tasks)


@pytest.fixture(autouse=True)
def _lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the stand-in in the place of lm-eval, for these tests alone: also out of the module that is built on it."""
    for name, module in harness().items():
        monkeypatch.setitem(sys.modules, name, module)
    _forget_interface()
    yield
    _forget_interface()


def _forget_interface() -> None:
    """Let the next import of the model interface look for lm-eval anew."""
    sys.modules.pop("meshloom.trainer.tasks.language_model", None)
    vars(tasks).pop("language_model", None)


def answers(rank: int, world_size: int) -> Answers:
    """Return the interface's answers to every kind of request."""
    from lm_eval.api.instance import Instance

    from meshloom.parallel.config import ParallelConfig
    from meshloom.parallel.layout import Layout
    from meshloom.parallel.mesh import Mesh
    from meshloom.trainer.tasks.language_model import LanguageModel

    mesh = Mesh.connect(Layout.plan(ParallelConfig(zero=0), world_size), torch.device("cpu"))
    seen = LanguageModel(model(), Tokenizer.bytes(), CONTEXT, mesh)

    def requests(kind: str, arguments: list[Any]) -> list[Instance]:
        return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    pairs = requests("loglikelihood", PAIRS)
    rolling = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    prompts = requests("generate_until", [(prompt, dict(RULES)) for prompt in PROMPTS])
    seen.check([*pairs, *rolling, *prompts])
    found = seen.loglikelihood(pairs), seen.loglikelihood_rolling(rolling), seen.generate_until(prompts)
    assert seen.loglikelihood(pairs) == found[0], "generation leaves no cache behind"
    mesh.close()
    return found


@torch.no_grad()
def one_by_one() -> Answers:
    """The same by one row of logits at a time."""
    decoder, tokenizer = model(), Tokenizer.bytes()
    prefix = tokenizer.end_of_document

    def scored(read: list[int], tokens: list[int]) -> tuple[float, bool]:
        row = torch.tensor([*read, *tokens][-CONTEXT - 1 :])
        logs_SV = torch.log_softmax(decoder(row[None, :-1])[0], -1)[-len(tokens) :]
        targets = torch.tensor(tokens)
        total = float(logs_SV.gather(1, targets[:, None]).sum())
        return total, bool((logs_SV.argmax(-1) == targets).all())

    pairs: list[tuple[float, bool]] = []
    for context, continuation in PAIRS:
        before = list(context.rstrip().encode()) or [prefix]
        pairs.append(scored(before, list((context + continuation).encode())[len(context.rstrip().encode()) :]))
    rolling: list[float] = []
    for text in TEXTS:
        tokens = list(text.encode())
        total = scored([prefix], tokens[:CONTEXT])[0]
        for at in range(CONTEXT, len(tokens), CONTEXT):  # the last window reads as far back as the context goes
            end = min(at + CONTEXT, len(tokens))
            total += scored(tokens[end - CONTEXT - 1 : at], tokens[at:end])[0]
        rolling.append(total)
    sampling = Sampling(temperature=0)
    said = [
        generate_texts(
            decoder, tokenizer, [list(prompt.encode())[-11:]], sampling, tokens=5, seed=0, context=CONTEXT, stop=["\n"]
        )
        for prompt in PROMPTS
    ]
    return pairs, rolling, [text.text for (text,) in said]


def test_answers_are_those_of_each_request_by_itself() -> None:
    expected = one_by_one()
    assert len(set(expected[2])) > 1
    for ranks in (1, 2):
        for pairs, rolling, said in run_ranks(ranks, answers):
            assert [greedy for _, greedy in pairs] == [greedy for _, greedy in expected[0]]
            assert [value for value, _ in pairs] == pytest.approx([value for value, _ in expected[0]], rel=1e-10)
            assert rolling == pytest.approx(expected[1], rel=1e-10)
            assert said == expected[2]


def other_questions(rank: int, world_size: int) -> str:
    """Ask rank 1 something else; return what is raised."""
    from lm_eval.api.instance import Instance

    from meshloom.parallel.config import ParallelConfig
    from meshloom.parallel.layout import Layout
    from meshloom.parallel.mesh import Mesh
    from meshloom.trainer.tasks.language_model import LanguageModel

    mesh = Mesh.connect(Layout.plan(ParallelConfig(zero=0), world_size), torch.device("cpu"))
    seen = LanguageModel(model(), Tokenizer.bytes(), CONTEXT, mesh)
    try:
        seen.loglikelihood([Instance("loglikelihood", {}, ("context", f" {rank}"), 0)])
    except RuntimeError as error:
        assert seen.failed_together
        return str(error)
    finally:
        mesh.close()
    return ""


def test_processes_with_other_questions_end_together() -> None:
    assert all("processes have different questions" in said for said in run_ranks(2, other_questions))


def test_requests_that_do_not_fit_are_told_before_anything_is_computed() -> None:
    from lm_eval.api.instance import Instance

    from meshloom.trainer.tasks.language_model import LanguageModel, sampling_of
    from meshloom.trainer.tasks.scoring import LongerThanContext

    class OneProcess:
        is_main, device = True, torch.device("cpu")

    seen: Any = LanguageModel(model(), Tokenizer.bytes(), CONTEXT, OneProcess())  # type: ignore[arg-type]
    with pytest.raises(LongerThanContext, match="17 tokens"):
        seen.check([Instance("loglikelihood", {}, ("context", "x" * 17), 0)])
    with pytest.raises(LongerThanContext, match="generates up to 16 tokens"):
        seen.check([Instance("generate_until", {}, ("context", {"max_gen_toks": 16}), 0)])
    assert (seen.prefix_token_id, seen.eot_token_id) == (256, 256)
    assert sampling_of({"temperature": 0.7, "top_k": 0}) == Sampling(0.7, None, 1.0, 0.0)
    assert sampling_of({}).temperature == 0
