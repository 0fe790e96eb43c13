"""Generation: the tokens of transformers and of the whole model, in batches of unequal prompts, and how tokens are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.config.structured import literal
from meshloom.data.tokenizing.tokenizer import Tokenizer
from meshloom.models.decoder import Decoder
from meshloom.trainer.build import build_model
from meshloom.trainer.generation import Sampling, cache_blocker, generate_texts, likelihoods
from meshloom.trainer.typed import typed_node
from meshloom.trainer.whole_model import load_whole_model
from support.hf_folder import write_model
from support.models import decoder

GREEDY = Sampling(temperature=0)
SLIDING = {"layer_types": ["sliding", "full"], "sliding_window": 3}
LATENT = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 5}
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7], [5, 9]]


class Numbers:
    """Each token is a letter of the alphabet; nothing ends a document."""

    end_of_document = -1

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 48 for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(48 + token) for token in tokens)


def whole(**keys: Any) -> Decoder:
    torch.manual_seed(0)
    model = decoder(**{"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 24, "vocabulary": 40, **keys}).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def plain(model: Decoder, prompt: list[int], tokens: int, context: int) -> list[int]:
    """Return what the model says when it reads everything again for each token."""
    said = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            said.append(int(model(torch.tensor([said[-context:]]))[0, -1].argmax()))
    return said


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"tied": True, "qk_norm": "head"},
        {**SLIDING, "logit_softcap": 5.0, "attention_softcap": 4.0},
        {**SLIDING, "sinks": True},
        {**SLIDING, "rope_fraction": 0.5},
        {"attention": "mla", "kv_heads": 4, "mla": LATENT},
        {"experts": {"count": 4, "top_k": 2, "ffn_dim": 12}},
        {"experts": {"count": 4, "top_k": 2, "ffn_dim": 12, "capacity": 1.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("context", [9, 64])
def test_batches_say_what_each_prompt_says_alone(keys: dict[str, Any], context: int) -> None:
    expected = [plain(whole(**keys), prompt, 8, context) for prompt in PROMPTS]
    slow: list[str] = []
    how: dict[str, Any] = {"tokens": 8, "seed": 1, "context": context, "on_uncached": slow.append}
    found = generate_texts(whole(**keys), Numbers(), PROMPTS, GREEDY, **how)
    assert [text.tokens for text in found] == expected
    blocked = cache_blocker(whole(**keys)) is not None
    assert len(slow) == (1 if blocked or context == 9 else 0)
    assert blocked == ("capacity" in str(keys))


def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'meshloom[hf]'")
    write_model(tmp_path / "theirs", vocabulary=257)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    ours = loaded(tmp_path / "theirs")
    prompts = [[*text.encode()] for text in ("def ", "a", "the quick brown fox")]
    found = generate_texts(ours, Tokenizer.bytes(), prompts, GREEDY, tokens=12, seed=1, context=64)
    for text, prompt in zip(found, prompts, strict=True):
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 256, "pad_token_id": 0}
        said = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)[0].tolist()
        assert text.tokens == said[: len(text.tokens)] and len(text.tokens) in (len(said), len(said) - 1)


def loaded(folder: Path) -> torch.nn.Module:
    """A model folder's model, as `meshloom generate` loads it."""
    from meshloom.checkpoint.restore import read_manifest

    config = literal(dict(read_manifest(f"hf:{folder}").state["config"]))
    model = build_model(typed_node("model", config["model"]), 257)
    return load_whole_model(model, f"hf:{folder}", torch.device("cpu"), torch.float32)


def test_a_text_depends_on_its_own_number_alone() -> None:
    how: dict[str, Any] = {"tokens": 10, "seed": 3, "context": 64}
    model, drawn = whole(), Sampling(1.0, None)
    together = generate_texts(model, Numbers(), PROMPTS, drawn, **how)
    apart = [generate_texts(model, Numbers(), [prompt], drawn, first=at, **how)[0] for at, prompt in enumerate(PROMPTS)]
    assert [text.tokens for text in together] == [text.tokens for text in apart]
    twice = generate_texts(model, Numbers(), [PROMPTS[0]] * 2, drawn, **how)
    assert twice[0].tokens != twice[1].tokens


def test_a_text_ends_before_a_stop_string_and_at_other_ends() -> None:
    model, how = whole(), {"tokens": 12, "seed": 1, "context": 64}
    (free,) = generate_texts(model, Numbers(), PROMPTS[:1], GREEDY, **how)
    cut = free.text[4:6]
    (stopped, other) = generate_texts(model, Numbers(), [PROMPTS[0], PROMPTS[2]], GREEDY, stop=["nowhere", cut], **how)
    assert stopped.ended == "stop" and stopped.text == free.text[: free.text.find(cut)]
    assert other.ended in ("stop", "length")
    token = free.tokens[free.start + 2]
    (ended,) = generate_texts(model, Numbers(), PROMPTS[:1], GREEDY, ends=[token], **how)
    assert ended.ended == "end" and ended.text == free.text[: free.tokens[free.start :].index(token)]


@pytest.mark.parametrize(
    "how",
    [
        Sampling(0.7, None, 0.8),
        Sampling(1.3, 6, 0.5),
        Sampling(1.0, None, 1.0, 0.1),
        Sampling(2.0, 9, 0.9, 0.3),
        Sampling(1.0, None, 1e-9),
    ],
)
def test_tokens_are_drawn_as_transformers_draws_them(how: Sampling) -> None:
    warpers = pytest.importorskip("transformers", reason="needs the extra: pip install 'meshloom[hf]'")
    logits = torch.randn(30, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 3
    steps = [warpers.TemperatureLogitsWarper(how.temperature)]
    steps += [] if how.top_k is None else [warpers.TopKLogitsWarper(how.top_k)]
    steps += [] if how.top_p == 1 else [warpers.TopPLogitsWarper(how.top_p)]
    steps += [] if how.min_p == 0 else [warpers.MinPLogitsWarper(how.min_p)]
    theirs = logits[None]
    for step in steps:
        theirs = step(torch.zeros(1, 1, dtype=torch.int64), theirs)
    ours = likelihoods(logits, how)
    torch.testing.assert_close(ours / ours.sum(), torch.softmax(theirs[0], -1), rtol=1e-9, atol=0)
