"""Sample text from a model: at the end of a run, and for `meshloom generate`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ...checkpoint.control import Control
from ...checkpoint.errors import CheckpointError
from ...checkpoint.folder import find_latest
from ...checkpoint.restore import restore
from ...models.protocol import Model
from ...parallel.box import Box
from ...parallel.fragment import Fragment
from ..loop import Loop
from .base import Hook

log = logging.getLogger(__name__)


class TextCodec(Protocol):
    """Turns text into token ids and back (`data.tokenizer.Tokenizer`)."""

    end_of_document: int

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...


def sample_token(logits_V: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Sample a token from softmax(logits / temperature) among the top_k likeliest; at temperature 0 take the likeliest."""
    if temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V.double() / temperature
    if top_k is not None and top_k < scaled_V.numel():
        smallest = torch.topk(scaled_V, top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < smallest, float("-inf"))
    return int(torch.multinomial(torch.softmax(scaled_V, dim=-1), 1, generator=generator))


@torch.no_grad()
def generate_tokens(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    temperature: float,
    top_k: int | None,
    seed: int,
    context: int,
) -> Iterator[int]:
    """Yield tokens that continue a prompt of at least one token, without end. Each sees at most `context` tokens before it.

    The model maps token ids (1, S) to logits (1, S, V). The whole context is computed again for every token.
    """
    assert len(prompt) > 0, "a model needs a token to begin with"
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    while True:
        logits_1SV = model(torch.tensor([tokens[-context:]], device=device))
        tokens.append(sample_token(logits_1SV[0, -1].float().cpu(), temperature, top_k, generator))
        yield tokens[-1]


def generate(
    model: nn.Module,
    codec: TextCodec,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 1,
    context: int,
) -> str:
    """Return the prompt and up to `tokens` tokens of its continuation, which ends early at the end of the document."""
    start = codec.encode(prompt) or [codec.end_of_document]
    added: list[int] = []
    for token in generate_tokens(model, start, temperature=temperature, top_k=top_k, seed=seed, context=context):
        if token == codec.end_of_document:
            break
        added.append(token)
        if len(added) >= tokens:
            break
    return prompt + codec.decode(added)


def load_whole_model(model: nn.Module, checkpoint: Path | str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Load a checkpoint's weights, saved on any layout, whole into a model on the meta device. Return it on `device`.

    Raises CheckpointError for a checkpoint that is damaged or lacks some of the weights.
    """
    names: dict[int, str] = {}
    ties: list[tuple[str, str]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names.setdefault(id(parameter), name) != name:
            ties.append((name, names[id(parameter)]))

    def give(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    model = model._apply(give).to(dtype)
    for name, source in ties:  # `_apply` gives every use of a tied weight its own storage
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))
    buffers = model.saved_buffers() if isinstance(model, Model) else {}
    fragments = [
        Fragment(name, "weight", tuple(parameter.shape), Box.whole(parameter.shape), parameter.detach())
        for name, parameter in [*model.named_parameters(), *buffers.items()]
    ]
    report = restore(checkpoint, fragments, Control.alone(), strict=False)  # the optimizer's state is not read
    if absent := sorted({*report.missing, *report.mismatched}):
        more = f" and {len(absent) - 4} more" if len(absent) > 4 else ""
        raise CheckpointError(f"{report.source} does not have this model's {', '.join(absent[:4])}{more}")
    return model.eval()


class SampleText(Hook):
    """Continues a prompt at the end of the run, and writes the text to sample.txt. Runs on one rank.

    It loads the weights from the run's last checkpoint, so it needs no other rank and works under any layout.

    build        makes the model on the meta device
    checkpoints  the folder of the run's checkpoints
    """

    alone = True

    def __init__(
        self, prompt: str, tokens: int, build: Callable[[], nn.Module], codec: TextCodec, seed: int, checkpoints: str
    ) -> None:
        self._prompt = prompt
        self._tokens = tokens
        self._checkpoints = checkpoints
        self._build = build
        self._codec = codec
        self._seed = seed

    def on_run_end(self, loop: Loop, output_dir: Path) -> None:
        """Generate the text, print it and write it."""
        checkpoint = find_latest(self._checkpoints)
        if checkpoint is None:  # a branch of a finished run takes no step, and saves nothing
            log.warning("trainer.sample_prompt: no sample, because '%s' holds no checkpoint", self._checkpoints)
            return
        model = load_whole_model(self._build(), checkpoint, loop.mesh.device, torch.float32)
        text = generate(model, self._codec, self._prompt, tokens=self._tokens, seed=self._seed, context=loop.horizon.seq_len)
        (output_dir / "sample.txt").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n")
