"""A stand-in for the part of lm-eval that the model interface is built on, for machines without the extra.

It has the names, arguments and results of lm-eval 0.4.13: a base class that cuts requests into tokens, two functions for
windows, and the request. `tests/trainer/test_tasks.py` holds the interface to lm-eval itself, where that is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass
class Instance:
    """A request: its kind, the question that it is of, what the model's method is given, and its number there."""

    request_type: str
    doc: dict[str, Any]
    arguments: tuple[Any, ...]
    idx: int

    @property
    def args(self) -> tuple[Any, ...]:
        """The argument of the model's method."""
        return self.arguments


class TemplateLM:
    """The base class: texts become tokens, which `_loglikelihood_tokens` of the model scores."""

    def _encode_pair(self: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
        kept = context.rstrip()  # spaces belong to the word behind them
        whole = self.tok_encode(context + continuation)
        before = self.tok_encode(kept)
        return before, whole[len(before) :]

    def loglikelihood(self: Any, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score each request's continuation behind its context, or behind the prefix token where that is empty."""
        cut: list[tuple[tuple[str, str], list[int], list[int]]] = []
        for request in requests:
            context, continuation = request.args
            if context:
                pair = self._encode_pair(context, continuation)
            else:
                tokens = self.tok_encode(continuation, add_special_tokens=False)
                prefixed = tokens if tokens[0] == self.prefix_token_id else [self.prefix_token_id, *tokens]
                pair = prefixed[:1], prefixed[1:]
            cut.append(((context, continuation), *pair))
        return self._loglikelihood_tokens(cut, disable_tqdm=disable_tqdm)


def get_rolling_token_windows(
    token_list: list[int], prefix_token: int, max_seq_len: int, context_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield what is read and what is scored: first a whole window behind the prefix, then windows that overlap by a context."""
    behind = [prefix_token, *token_list]  # behind[k] is what stands before token k
    start = 0
    while start < len(token_list):
        scored = max_seq_len if start == 0 else max_seq_len - context_len + 1
        end = min(start + scored, len(token_list))
        yield behind[max(0, end - max_seq_len) : end], token_list[start:end]
        start = end


def make_disjoint_window(pair: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """Take from what is read all that is scored, too."""
    read, scored = pair
    return read[: len(read) - len(scored) + 1], scored


def harness() -> dict[str, ModuleType]:
    """Return modules to put into `sys.modules`; none where lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is not None:
        return {}
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.instance", "lm_eval.utils")
    modules = {name: ModuleType(name) for name in names}
    vars(modules["lm_eval.api.model"])["TemplateLM"] = TemplateLM
    vars(modules["lm_eval.api.instance"])["Instance"] = Instance
    vars(modules["lm_eval.utils"]).update(
        get_rolling_token_windows=get_rolling_token_windows, make_disjoint_window=make_disjoint_window
    )
    return {name: module for name, module in modules.items() if name not in sys.modules}
