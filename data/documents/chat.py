"""Conversations as text: a tokenizer's chat template, with the spans that the assistant says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...config.cache import expand_user
from ...config.problems import ConfigError, Problem
from .formats import import_extra, missing_extra
from .marked import MarkedText

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
MADE = ("bpe", "bytes")
"""Settings of a tokenizer that is made here, so that nothing lies beside it."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template in Jinja, as `apply_chat_template` of transformers takes it.

    text    the template; "" where none was found
    names   bos_token, eos_token and the like, which it may refer to
    needed  whether none was given for a tokenizer that is made here, which has none
    """

    text: str
    names: Mapping[str, str]
    needed: bool = False

    @classmethod
    def find(cls, template: str | None, tokenizer: str) -> ChatTemplate:
        """Read a template from a file; None: the one beside the tokenizer, which is a file or a folder.

        Raises ConfigError for settings of the tokenizer that can't be read.
        """
        folder = _folder_of(tokenizer)
        settings = {} if folder is None else _settings(folder / SETTINGS)
        names = {key: _content(value) for key, value in settings.items() if key.endswith("_token") and value}
        if template is not None:
            path = expand_user(template)
            return cls(path.read_text("utf-8") if path.is_file() else "", names)
        if folder is None:
            return cls("", names, needed=tokenizer in MADE)
        if (folder / TEMPLATE).is_file():
            return cls((folder / TEMPLATE).read_text("utf-8"), names)
        return cls(_default(settings.get("chat_template")), names)

    def problems(self, key: str) -> list[Problem]:
        """Return what keeps the template from being used. key: the config node's."""
        found = missing_extra("transformers", "hf", f"{key}.messages", "a chat template")
        if self.needed:
            fix = f"give the file of a Jinja template as {key}.chat_template, or a folder with one as data.tokenizer"
            found.append(Problem(f"{key}.messages", "a tokenizer that is made here has no chat template", fix))
        elif not self.text:
            fix = f"give the file of a Jinja template, or a folder with {TEMPLATE} as data.tokenizer"
            found.append(Problem(f"{key}.chat_template", "there is no chat template", fix))
        elif not MARK.search(self.text):
            fix = "put {% generation %} … {% endgeneration %} around them in a copy, and give that"
            found.append(Problem(f"{key}.chat_template", "it does not mark what the assistant says", fix))
        return found

    def render(self, messages: Any) -> MarkedText:
        """Return a conversation as text, of which the assistant's spans are learned. Raises ValueError for what is none."""
        if not isinstance(messages, list) or not all(isinstance(each, dict) for each in cast(list[Any], messages)):
            raise ValueError("is no conversation of this chat template (it is no list of messages, each an object)")
        library = import_extra("transformers.utils.chat_template_utils", "hf", "a chat template")
        try:
            (text,), (spans,) = library.render_jinja_template(
                [messages], chat_template=self.text, return_assistant_tokens_mask=True, **self.names
            )
        except Exception as problem:  # a template may raise anything for roles that it does not know
            raise ValueError(f"is no conversation of this chat template ({problem})") from problem
        return MarkedText(text, [(start, stop) for start, stop in spans if start < stop], specials=True)

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as text, up to where the assistant begins to speak. Raises ValueError for what is none."""
        library = import_extra("transformers.utils.chat_template_utils", "hf", "a chat template")
        try:
            (text,), _ = library.render_jinja_template(
                [messages], chat_template=self.text, add_generation_prompt=True, **self.names
            )
        except Exception as problem:  # as above
            raise ValueError(f"is no conversation of this chat template ({problem})") from problem
        return text


def _folder_of(tokenizer: str) -> Path | None:
    """Return the folder in which a tokenizer lies; None for one that is made here, or not found."""
    place = expand_user(tokenizer)
    if tokenizer in MADE or not place.exists():
        return None
    return place if place.is_dir() else place.parent


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings beside a tokenizer, {} if there are none. Raises ConfigError for those that can't be read.

    Without them a text would begin with another token, and nobody would know.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as problem:
        fix = "copy the file again, or remove it if the tokenizer needs no settings"
        raise ConfigError([Problem("data.tokenizer", f"'{path}' can't be read: {problem}", fix)]) from problem
    return cast(dict[str, Any], found)


def _content(value: Any) -> str:
    return str(value["content"] if isinstance(value, dict) else value)


def _default(template: Any) -> str:
    """Return the template of a tokenizer's settings: their only one, or the one called default."""
    if isinstance(template, list):
        named = {str(each["name"]): str(each["template"]) for each in cast(list[dict[str, Any]], template)}
        return named.get("default", "")
    return template if isinstance(template, str) else ""
