"""Generate text with a whole model: several prompts at once, with a cache of keys and values where the model allows one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from ..config.hashing import hash64
from ..data.tokenizing.decoding import decode_behind
from ..kernels.cached_attention import CachedAttention
from ..models.protocol import BlockKernels, Model


class TextCodec(Protocol):
    """Turns text into token ids and back (`data.tokenizing.tokenizer.Tokenizer`)."""

    end_of_document: int

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...


@dataclass(frozen=True)
class Sampling:
    """A rule for drawing tokens. Of the likeliest tokens, those remain that pass every limit.

    temperature  divides the logits; 0 always takes the likeliest token
    top_k        so many of the likeliest tokens; None: all
    top_p        the fewest tokens whose probabilities add up to it, "nucleus" (Holtzman et al., arXiv 1904.09751); 1: all
    min_p        tokens at least so likely as this share of the likeliest one (Nguyen et al., arXiv 2407.01082); 0: all
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0


def sample_token(logits_V: torch.Tensor, how: Sampling, generator: torch.Generator) -> int:
    """Draw a token by its likelihood; at temperature 0 take the likeliest."""
    if how.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(likelihoods(logits_V, how), 1, generator=generator))


def likelihoods(logits_V: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Return the likelihood with which each token is drawn, (V,) float64, up to a common factor; 0 beyond a limit.

    The limits come in the order of transformers: top_k, top_p among these, then min_p.
    """
    scaled_V = logits_V.double() / how.temperature
    if how.top_k is not None and how.top_k < scaled_V.numel():
        smallest = torch.topk(scaled_V, how.top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < smallest, float("-inf"))
    if how.top_p < 1:
        sorted_V, order_V = torch.sort(scaled_V, descending=True)
        likelihood_V = torch.softmax(sorted_V, -1)
        beyond_V = likelihood_V.cumsum(-1) - likelihood_V >= how.top_p  # those before it suffice
        scaled_V = scaled_V.masked_fill(torch.zeros_like(beyond_V).scatter(0, order_V, beyond_V), float("-inf"))
    likelihood_V = torch.softmax(scaled_V, -1)
    if how.min_p > 0:
        likelihood_V = likelihood_V.masked_fill(likelihood_V < how.min_p * likelihood_V.max(), 0.0)
    return likelihood_V


def cache_blocker(model: nn.Module) -> str | None:
    """Return why a model's tokens must be computed anew, and each text by itself; None where it allows a cache."""
    shape = model.decoder_config if isinstance(model, Model) else None
    if shape is None:
        return "it is no decoder of Meshloom's"
    if not shape.mixture_layers():
        return None
    if shape.experts.capacity is not None:
        return "its experts have a capacity (model.experts.capacity), so that tokens depend on one another"
    parts = shape.experts.parts
    if any(part is not None for part in (parts.router, parts.dispatch, parts.product, parts.combine)):
        return "its mixtures have parts of your own (model.experts.parts)"
    return None


@dataclass
class Text:
    """A text being generated.

    tokens  of the prompt, then those that were added
    start   where the added ones begin
    ended   why it ended: "end" of the document, "stop" string, "length"; "": it goes on
    text    of the added tokens, once it has ended
    """

    tokens: list[int]
    generator: torch.Generator
    start: int = field(init=False)
    ended: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        assert self.tokens, "a model needs a token to begin with"
        self.start = len(self.tokens)

    def said(self, codec: TextCodec) -> str:
        """Return the text of the added tokens."""
        return decode_behind(codec.decode, self.tokens[: self.start], self.tokens[self.start :])


@torch.no_grad()
def generate_texts(
    model: nn.Module,
    codec: TextCodec,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    *,
    tokens: int,
    seed: int,
    context: int,
    stop: Sequence[str] = (),
    ends: Sequence[int] = (),
    first: int = 0,
    on_uncached: Callable[[str], None] = lambda _: None,
) -> list[Text]:
    """Continue prompts of token ids, all at once where the model allows it, by up to `tokens` tokens each.

    A text ends early at the end of its document or a token of `ends`, which stays out of it, and before the first of the `stop`
    strings. Each new token sees at most `context` tokens before it. A text depends on the seed and its number alone (the
    first is number `first`), not on the others.

    on_uncached: told once why the whole context is computed again for every token, where it is
    """
    texts = [Text(list(prompt) or [codec.end_of_document], _generator(seed, first + at)) for at, prompt in enumerate(prompts)]
    final = {codec.end_of_document, *ends}
    reader = _Reader(model, context, on_uncached)
    going = list(texts)
    while going:
        logits_BV = reader.next_logits([text.tokens for text in going])
        for text, token in zip(going, _next_tokens(logits_BV, how, going), strict=True):
            _add(text, token, final, codec, stop, tokens)
        still = [at for at, text in enumerate(going) if not text.ended]
        reader.keep_rows(still)
        going = [going[at] for at in still]
    return texts


def _next_tokens(logits_BV: torch.Tensor, how: Sampling, texts: Sequence[Text]) -> list[int]:
    """Return the next token of each text. The likeliest ones are found on the device; others are drawn on the host."""
    if how.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    return [sample_token(logits_V, how, text.generator) for logits_V, text in zip(logits_BV.cpu(), texts, strict=True)]


def _generator(seed: int, number: int) -> torch.Generator:
    """Return the random numbers of a text: the first has the seed itself."""
    return torch.Generator().manual_seed(seed if number == 0 else hash64(seed, number) >> 1)


def _add(text: Text, token: int, final: set[int], codec: TextCodec, stop: Sequence[str], most: int) -> None:
    """Add a token to a text, or end it."""
    if token in final:
        text.ended, text.text = "end", text.said(codec)
        return
    text.tokens.append(token)
    if stop:
        said = text.said(codec)
        places = [place for place in map(said.find, stop) if place >= 0]
        if places:
            text.ended, text.text = "stop", said[: min(places)]
            return
    if len(text.tokens) - text.start >= most:
        text.ended, text.text = "length", text.said(codec)


class _Reader:
    """Computes the logits behind texts, with a cache while they fit the context.

    Behind that, the positions of the tokens that are still seen change with every token, and so do all keys and values.
    """

    def __init__(self, model: nn.Module, context: int, on_uncached: Callable[[str], None]) -> None:
        self._model, self._context, self._on_uncached = model, context, on_uncached
        self._device = next(model.parameters()).device
        self._blocker, self._told = cache_blocker(model), False
        self._caches: list[CachedAttention] = []
        self._padding_B = torch.empty(0, dtype=torch.int64)
        self._read = 0  # positions of the padded rows that the caches hold

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self._device)
        if self._caches:
            self._padding_B = self._padding_B[chosen]
            for cache in self._caches:
                cache.keep_rows(chosen)

    def next_logits(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits of the token behind each text, (B, V) float32 on the model's device."""
        if self._blocker is not None:
            self._tell(self._blocker)
            rows = [self._model(self._tensor([text[-self._context :]]))[0, -1] for text in texts]
            return torch.stack(rows).float()
        longest = max(map(len, texts))
        if longest > self._context:
            self._tell(f"a text is longer than the context of {self._context} tokens")
            self._caches = []
            texts = [text[-self._context :] for text in texts]
            longest = self._context
        if not self._caches:
            self._begin(texts, longest)
        width = longest if self._read == 0 else 1
        filled = [text[-1:] if self._read else [*([text[0]] * (longest - len(text))), *text] for text in texts]
        positions_BS = torch.arange(self._read, self._read + width, device=self._device) - self._padding_B[:, None]
        logits_BSV = self._model(self._tensor(filled), positions_BS=positions_BS.clamp(min=0))
        self._read += width
        return logits_BSV[:, -1].float()

    def _begin(self, texts: Sequence[Sequence[int]], longest: int) -> None:
        """Begin with empty caches, for rows that are filled up on the left to one length."""
        assert isinstance(self._model, Model)
        self._padding_B = torch.tensor([longest - len(text) for text in texts], device=self._device)
        layers = list(self._model.block_modules())
        self._caches = [CachedAttention(self._padding_B) for _ in layers]
        self._model.use_kernels({layer: BlockKernels(each) for layer, each in zip(layers, self._caches, strict=True)})
        self._read = 0

    def _tensor(self, rows: list[list[int]] | list[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self._device)

    def _tell(self, why: str) -> None:
        if not self._told:
            self._on_uncached(why)
        self._told = True
