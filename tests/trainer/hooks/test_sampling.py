"""Text from a model: how tokens are drawn, and weights brought from a checkpoint into a plain model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.folder import find_latest
from meshloom.models.decoder import Decoder
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from meshloom.trainer.generation import Sampling, generate_texts, sample_token
from meshloom.trainer.hooks.sampling import SampleText
from meshloom.trainer.whole_model import load_whole_model
from support.models import decoder


class Successor(nn.Module):
    """Logits that make token t + 1 (mod V) all but certain after t; remembers how much it was shown."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Parameter(100.0 * torch.eye(vocabulary).roll(1, dims=1))
        self.longest = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest, tokens.shape[1])
        return self.table[tokens]


class Letters:
    end_of_document = 26

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token + ord("a")) for token in tokens)


def test_generation_follows_the_model_and_stops_at_document_end() -> None:
    model = Successor(27)

    def added(prompt: str, tokens: int) -> tuple[str, str]:
        codec = Letters()
        (text,) = generate_texts(model, codec, [codec.encode(prompt)], Sampling(), tokens=tokens, seed=0, context=4)
        return text.text, text.ended

    assert added("uv", 50) == ("wxyz", "end")
    assert added("a", 3) == ("bcd", "length")
    assert model.longest == 4
    assert added("", 2) == ("ab", "length")  # begins at an end of document


def test_draw_has_the_softmax_frequencies() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    generator = torch.Generator().manual_seed(1)
    counts = Counter(sample_token(logits, Sampling(1.0, None), generator) for _ in range(4000))
    assert [counts[token] / 4000 for token in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)
    counts = Counter(sample_token(logits, Sampling(0.5, None), generator) for _ in range(4000))  # squares, normalised
    assert [counts[token] / 4000 for token in range(4)] == pytest.approx([1 / 30, 4 / 30, 9 / 30, 16 / 30], abs=0.03)
    counts = Counter(sample_token(logits, Sampling(1.0, 2), generator) for _ in range(2000))
    assert set(counts) == {2, 3} and counts[3] / 2000 == pytest.approx(4 / 7, abs=0.04)


def test_temperature_zero_takes_the_likeliest_and_seeds_repeat() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9])
    assert sample_token(logits, Sampling(0, None), torch.Generator()) == 1
    torch.manual_seed(0)
    model = nn.Embedding(9, 9)

    def first(seed: int) -> list[int]:
        (text,) = generate_texts(model, Letters(), [[1]], Sampling(1.0, None), tokens=20, seed=seed, context=5)
        return text.tokens

    assert first(3) == first(3) != first(4)


def build(tied: bool = False) -> Decoder:
    return decoder(dim=8, layers=2, heads=2, kv_heads=1, ffn_dim=16, vocabulary=27, tied=tied)


def empty() -> Decoder:
    with torch.device("meta"):
        return build()


def save(model: nn.Module, folder: Path) -> None:
    fragments = [
        Fragment(name, "weight", tuple(parameter.shape), Box.whole(parameter.shape), parameter.detach())
        for name, parameter in model.named_parameters()
    ]
    checkpointer = Checkpointer(folder, Control.alone(), CheckpointConfig(mode="sync"))
    checkpointer.save(7, iter(fragments), {})
    checkpointer.finish()
    checkpointer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_model_gets_a_checkpoints_weights(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    original = build(tied)
    save(original, tmp_path)
    found = find_latest(tmp_path)
    assert found is not None
    with torch.device("meta"):
        model = build(tied)
    loaded = load_whole_model(model, found, torch.device("cpu"), torch.float32)
    tokens = torch.arange(6).unsqueeze(0)
    assert torch.equal(loaded(tokens), original(tokens))


def sampled(folder: Path, make: Callable[[], nn.Module], dtype: torch.dtype) -> Path:
    """Return the place of the sample at a run's end, if there is one."""
    loop: Any = SimpleNamespace(mesh=SimpleNamespace(device=torch.device("cpu")), horizon=SimpleNamespace(seq_len=8))
    SampleText("ab", 3, make, Letters(), 0, str(folder), dtype).on_run_end(loop, folder)
    return folder / "sample.txt"


def test_the_end_of_a_run_has_a_sample_in_the_run_s_precision(tmp_path: Path) -> None:
    save(build(), tmp_path)
    built: list[nn.Module] = []

    def make() -> nn.Module:
        built.append(empty())
        return built[-1]

    assert sampled(tmp_path, make, torch.bfloat16).read_text().startswith("ab")
    assert {parameter.dtype for parameter in built[0].parameters()} == {torch.bfloat16}


def test_a_model_that_does_not_fit_is_no_end_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(build(), tmp_path)

    def make() -> nn.Module:
        raise torch.OutOfMemoryError("tried to allocate 131.42 GiB")

    assert not sampled(tmp_path, make, torch.float32).exists()
    (message,) = caplog.messages
    assert "no sample" in message and "131.42 GiB" in message and f"meshloom generate checkpoint={tmp_path}" in message
