"""The verdict of all ranks on a step that they restore: each says how it fared, and all do the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .control import Round
from .reading.shared_reader import PASSED_ON


def all_matched(talk: Round, mine: bool) -> bool:
    """Agree whether every rank has come as far as reading, which they then do together."""
    return talk.agree("matched", b"1" if mine else b"0", min, lambda least: least) == b"1"


def agree_on_verdict(talk: Round, answer: dict[str, Any], strict: bool) -> dict[str, Any]:
    """One verdict for all ranks: {"unused": …} to go on, {"damaged": …} to try an older step, {"refused": …} to stop.

    A rank says which of the stored arrays it has no use for, which mostly are the same few, or none, on many ranks.
    """

    def decide(joined: bytes) -> bytes:
        verdict: dict[str, Any] = json.loads(joined)
        if strict and verdict.get("unused"):
            weights = any(key.startswith("weight/") for key in verdict["unused"])
            fix = "Choose the model whose weights they are" if weights else "With checkpoint.strict=false they are left out"
            what = f"holds arrays that this run does not have: {some(verdict['unused'])}"
            verdict = {"refused": f"{verdict['source']} {what}. {fix}"}
        return json.dumps(verdict).encode()

    return json.loads(talk.agree("prepared", json.dumps(answer).encode(), _join_answers, decide))


def _join_answers(messages: Sequence[bytes]) -> bytes:
    """Join the answers of several ranks: a refusal counts most, then damage; otherwise what none of them has used.

    Of a fault it is told what the rank says that has met it.
    """
    answers: list[dict[str, Any]] = [json.loads(message) for message in messages]
    for kind in ("refused", "damaged"):
        found = [answer for answer in answers if kind in answer]
        if found:
            seen = [answer for answer in found if PASSED_ON not in answer[kind]]
            return json.dumps([*seen, *found][0]).encode()
    unused = set(answers[0]["unused"]).intersection(*(answer["unused"] for answer in answers[1:]))
    return json.dumps({**answers[0], "unused": sorted(unused)}).encode()


def some(items: list[str]) -> str:
    """Join the first eight of some messages, and count the others."""
    return "; ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
