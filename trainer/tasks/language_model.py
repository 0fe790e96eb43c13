"""lm-eval's model interface for a whole model on every process. Requests are divided among the processes.

Every process sees all requests, in the same order, and gets all results. So lm-eval is told that there is one process.
"""

from __future__ import annotations

import logging
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import xxhash
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from torch import nn

from ...data.tokenizing.tokenizer import Tokenizer
from ...models.protocol import BlockKernels, Model
from ...parallel.heartbeat import Phase
from ...parallel.mesh import Mesh
from ..all_ranks import raise_on_all_ranks
from ..generation import Sampling, generate_texts
from .scoring import Continuation, LongerThanContext, deal_by_cost, refuse_longer, score

log = logging.getLogger(__name__)
T = TypeVar("T")

GENERATED = 256
"""Tokens that a task generates at most, where it does not say; as lm-eval's own models."""
_TEXTS = 32  # generated at once
_KNOWN_RULES = frozenset(("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p"))
_UNCACHED = frozenset(("use_cache",))  # of transformers; they change no text


class LanguageModel(TemplateLM):  # pyright: ignore[reportUntypedBaseClass]
    """A model of Meshloom's as lm-eval sees it. Its methods are collective: every process calls them with the same requests.

    context  tokens that the model reads at most
    prefix   id of the token before a text without context; None: the end of a document
    failed_together  whether one of its methods has raised, which it then did on all processes
    """

    failed_together = False

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, context: int, mesh: Mesh, prefix: int | None = None) -> None:
        super().__init__()
        self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
        self._device = mesh.device
        self.max_length = context
        self._prefix = tokenizer.end_of_document if prefix is None else prefix

    @property
    def eot_token_id(self) -> int:
        """Id of the end of a document."""
        return self._tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text that has no context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval keeps requests, where it is asked to."""
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text as the model's users do: with the tokens that its tokenizer.json puts around a text."""
        return self._tokenizer.encode(string, specials=True, post_process=add_special_tokens is not False)

    def check(self, requests: Iterable[Any]) -> None:
        """Raise LongerThanContext for a request that the model can't answer. Say which rules of generation are not read."""
        unread = set[str]()
        for request in requests:
            if request.request_type == "loglikelihood":
                before, after = request.args
                tokens = self._encode_pair(before, after)[1] if before else self.tok_encode(after, add_special_tokens=False)
                refuse_longer(Continuation((), tokens), self.max_length)
            elif request.request_type == "generate_until":
                self._longest_prompt(request.args[1])
                unread |= request.args[1].keys() - _KNOWN_RULES - _UNCACHED
        if unread and self._mesh.is_main:
            log.warning("generation_kwargs of a task that are not read: %s", ", ".join(sorted(unread)))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is what the model itself would say."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        pairs = [Continuation(before, tokens) for _, before, tokens in requests]
        cut = sum(len(pair.context) + len(pair.tokens) > self.max_length + 1 for pair in pairs)
        if cut and self._mesh.is_main:
            log.warning(
                "%d of %d requests are longer than the context of %d: they lose their beginning",
                cut,
                len(pairs),
                self.max_length,
            )
        self._compare(lambda: digest_of(each for pair in pairs for each in (pair.context, pair.tokens)))
        found = torch.zeros(len(pairs), 2, dtype=torch.float64)

        def compute() -> None:
            for number, one in score(self._model, pairs, self.max_length, self._mesh.rank, self._mesh.layout.world_size):
                self._mesh.heartbeat.beat(Phase.TASKS, number)
                found[number] = torch.tensor([one.log_likelihood, float(one.greedy)], dtype=torch.float64)

        self._on_all_ranks(compute)
        return [(value, greedy > 0) for value, greedy in self._mesh.sum(found.to(self._mesh.device)).tolist()]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each whole text. Of one longer than the context, each token is scored once."""
        owners, windows = list[int](), list[tuple[None, list[int], list[int]]]()
        for number, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for before, tokens in map(make_disjoint_window, cut):
                owners.append(number)
                windows.append((None, before, tokens))
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return what the model says behind each context, up to one of the task's stop strings."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            rules: Mapping[str, Any] = requests[numbers[0]].args[1]
            texts = self._generate([requests[number].args[0] for number in numbers], rules)
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
        return answers

    def _generate(self, contexts: Sequence[str], rules: Mapping[str, Any]) -> list[str]:
        """Continue contexts by one task's rules."""
        tokens, prompts = _generated(rules), list[list[int]]()
        stops = rules.get("until") or []
        stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]

        def encode() -> str:
            longest = self._longest_prompt(rules)
            prompts.extend(self.tok_encode(text)[-longest:] for text in contexts)
            return repr(sorted(rules.items())) + digest_of(prompts)

        self._compare(encode)
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        ranks = self._mesh.layout.world_size
        size = min(_TEXTS, -(-len(order) // ranks))
        firsts = range(0, len(order), size)
        dealt = deal_by_cost([len(prompts[order[first]]) + tokens for first in firsts], ranks)[self._mesh.rank]
        starts = [firsts[number] for number in dealt]

        def compute() -> dict[int, str]:
            found: dict[int, str] = {}
            for start in starts:
                self._mesh.heartbeat.beat(Phase.TASKS, start)
                numbers = order[start : start + size]
                texts = generate_texts(
                    self._model,
                    self._tokenizer,
                    [prompts[number] for number in numbers],
                    sampling_of(rules),
                    tokens=tokens,
                    seed=0,
                    context=self.max_length,
                    stop=stops,
                    first=start,
                )
                found |= {number: text.text for number, text in zip(numbers, texts, strict=True)}
            return found

        local = _with_own_kernels(self._model, lambda: self._on_all_ranks(compute))
        answers = {number: text for each in self._mesh.gather_objects(local) for number, text in each.items()}
        return [answers[number] for number in range(len(contexts))]

    def _longest_prompt(self, rules: Mapping[str, Any]) -> int:
        """Return how many tokens of a prompt the context has beside those that are generated. Raises LongerThanContext."""
        tokens = _generated(rules)
        if tokens >= self.max_length:
            raise LongerThanContext(f"a task generates up to {tokens} tokens, and the context has {self.max_length}")
        return self.max_length - tokens

    def _compare(self, digest: Callable[[], str]) -> None:
        """Raise on all processes where they have other requests: each would answer questions that others do not know."""
        if self._mesh.differ(self._on_all_ranks(digest)):
            self.failed_together = True
            raise RuntimeError("processes have different questions: give all of them the same tasks and data sets")

    def _on_all_ranks(self, action: Callable[[], T]) -> T:
        """As `raise_on_all_ranks`, and remember that all have failed."""
        try:
            return raise_on_all_ranks(self._mesh, action)
        except Exception:
            self.failed_together = True
            raise


def digest_of(tokens: Iterable[Sequence[int]]) -> str:
    """Return a digest of lists of token ids."""
    found = xxhash.xxh3_64()
    for each in tokens:
        found.update(array("q", (len(each), *each)).tobytes())
    return found.hexdigest()


def _generated(rules: Mapping[str, Any]) -> int:
    return int(rules.get("max_gen_toks", rules.get("max_new_tokens", GENERATED)))


def sampling_of(rules: Mapping[str, Any]) -> Sampling:
    """Return how a task draws tokens, by its generation_kwargs: the likeliest ones, unless it says do_sample."""
    if not rules.get("do_sample", float(rules.get("temperature") or 0) > 0):
        return Sampling(temperature=0)
    top_k = rules.get("top_k")
    return Sampling(
        float(rules.get("temperature", 1.0)), top_k or None, float(rules.get("top_p", 1.0)), float(rules.get("min_p", 0.0))
    )


def _with_own_kernels(model: nn.Module, generate: Callable[[], T]) -> T:
    """Generate, and give the layers their attention without a cache back."""
    try:
        return generate()
    finally:
        if isinstance(model, Model):
            model.use_kernels({layer: BlockKernels() for layer in model.block_modules()})
