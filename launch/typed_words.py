"""Tell which keys a command line sets, and whether a plan may change the others."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from ..config.keys import Side
from ..config.overrides import normalize_override
from ..optim.batch.config import MICRO_SIDE
from ..trainer.schema import RunConfig


def given_keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys that a command line sets. Words that can't be parsed are left out."""
    keys: set[str] = set()
    for line in overrides:
        with contextlib.suppress(OverrideParseException):
            keys |= {word.key_or_group for word in OverridesParser.create().parse_overrides([normalize_override(line)])}
    return keys


def micro_is_fixed(config: RunConfig) -> str:
    """Return why another batch.micro would mean other losses or other batches; empty where it would not."""
    if MICRO_SIDE.of(config) is Side.RECIPE:
        return f"it is recipe under {MICRO_SIDE.when}"
    return ""
