"""Tell which keys a command line sets, whether a plan may change the others, and write what it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from ..config.keys import Side
from ..config.overrides import normalize_override
from ..optim.batch.config import MICRO_SIDE
from ..trainer.schema import RunConfig
from ..trainer.stages.written import written_value


def given_keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys that a command line sets. Words that can't be parsed are left out."""
    keys: set[str] = set()
    for line in overrides:
        with contextlib.suppress(OverrideParseException):
            keys |= {word.key_or_group for word in OverridesParser.create().parse_overrides([normalize_override(line)])}
    return keys


def changed_words(settings: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Write, as words of a command line, the settings that differ from those given of the same keys."""
    return [f"{key}={written_value(value)}" for key, value in settings.items() if value != given[key]]


def micro_is_fixed(config: RunConfig) -> str:
    """Return why another batch.micro would mean other losses or other batches; empty where it would not."""
    if MICRO_SIDE.of(config) is Side.RECIPE:
        return f"it is recipe under {MICRO_SIDE.when}"
    return ""
