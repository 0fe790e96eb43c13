"""The token that begins a text, as the settings beside a tokenizer say."""

from __future__ import annotations

from ...data.chat import ChatTemplate
from ...data.tokenizer import Tokenizer


def beginning_token(tokenizer: Tokenizer, file: str) -> int | None:
    """Return the id of the token that begins a text, by the settings beside a tokenizer's file; None where there is none."""
    return tokenizer.token_id(ChatTemplate.find(None, file).names.get("bos_token", ""))
