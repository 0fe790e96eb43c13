"""The document of a record: the text of a member, behind a prompt that is not learned, or a conversation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

import xxhash

from ...config.problems import Problem
from .chat import ChatTemplate
from .marked import MarkedText


class MemberError(ValueError):
    """A record that is none, or whose member is missing, or no text. key: of the config, which names the member or the files"""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class RecordText:
    """Rule by which a record becomes a document.

    field     the member with the text
    prompt    the member with a text that stands before it and carries no loss; None: there is none
    messages  the member with a conversation, in place of both; None: there is none
    template  the chat template that conversations are written by
    """

    field: str = "text"
    prompt: str | None = None
    messages: str | None = None
    template: ChatTemplate | None = None

    @property
    def masked(self) -> bool:
        """True if only a part of each document carries loss."""
        return self.prompt is not None or self.messages is not None

    @property
    def members(self) -> dict[str, str]:
        """Key of the config → the member of a record that it names; the member with what is learned comes last."""
        if self.messages is not None:
            return {"messages": self.messages}
        return {"field": self.field} if self.prompt is None else {"prompt": self.prompt, "field": self.field}

    @property
    def learned(self) -> tuple[str, str]:
        """Key and name of the member with what is learned."""
        return [*self.members.items()][-1]

    @property
    def settings(self) -> str:
        """The settings that decide the documents, for their identity."""
        if self.messages is not None and self.template is not None:
            written = json.dumps([self.template.text, sorted(self.template.names.items())])
            return f"{self.messages!r} by {xxhash.xxh3_128_hexdigest(written.encode())}"
        return f"{self.field!r}" if self.prompt is None else f"{self.prompt!r} {self.field!r}"

    def problems(self, key: str) -> list[Problem]:
        """Return what is wrong with the settings. key: the config node's."""
        if self.messages is None:
            return []
        found = [] if self.prompt is None else [Problem(f"{key}.prompt", "a conversation has its own", "leave it null")]
        return found + ([] if self.template is None else self.template.problems(key))

    def of(self, record: dict[str, Any]) -> str:
        """Return the document of a record; "" for none. Raises ValueError for what is none.

        It is a MemberError, which names the members that there are, where one is missing or not text.
        """
        if self.messages is not None:
            assert self.template is not None
            return self.template.render(without_surrogates(_member(record, self.messages)))
        text = field_text(record, self.field)
        if self.prompt is None or not text:
            return text
        prompt = field_text(record, self.prompt, "prompt")
        return MarkedText(prompt + text, [(len(prompt), len(prompt) + len(text))])


def _member(record: dict[str, Any], name: str) -> Any:
    if name not in record:
        raise MemberError("messages", f"no field '{name}' among {', '.join(record) or 'none'}")
    return record[name]


def field_text(record: dict[str, Any], field: str, key: str = "field") -> str:
    """Return the text in a record's field; "" for a null. Raises MemberError naming the fields that there are.

    key: of the config, which names the field
    """
    if field not in record:
        raise MemberError(key, f"no field '{field}' among {', '.join(record) or 'none'}")
    text = record[field]
    if not isinstance(text, str | None):
        raise MemberError(key, f"field '{field}' is not text but {type(text).__name__}")
    return without_surrogates(text or "")


def without_surrogates(value: Any) -> Any:
    """Return a JSON value with U+FFFD in place of halves of surrogate pairs, which JSON can write, and no tokenizer takes."""
    if isinstance(value, dict):
        return {name: without_surrogates(each) for name, each in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [without_surrogates(each) for each in cast(list[Any], value)]
    if not isinstance(value, str):
        return value
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
