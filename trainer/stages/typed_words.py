"""Words of a command line that later stages need: typed values for a group, of which a stage chooses another option.

A checkpoint's config has the values of the options that its stage has. It lacks those that were typed for an option which a
later stage chooses, so the words themselves are kept beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.errors import OverrideParseException

from ...config.keys import Side
from ..resumed_config import typed_values
from ..schema import OPTIONS, RunConfig
from ..sides import key_sides
from .written import Stage

log = logging.getLogger(__name__)

UNKEPT = ("_target_", "${")
"""No word with one of these is kept: a resume takes no class, and nothing of its environment, from a checkpoint's text."""


@dataclass(frozen=True)
class Words:
    """The words of which the stages of a run are composed.

    typed    of this command line
    choices  of a resumed run: the options that the checkpoint has, where this command line chooses none
    held     typed at earlier starts of the run, and not since
    """

    typed: Sequence[str]
    choices: Sequence[str] = ()
    held: Sequence[str] = ()

    @property
    def all(self) -> list[str]:
        """Return all words, in the order in which they hold over one another."""
        return [*self.choices, *self.held, *self.typed]

    def kept(self, config: RunConfig) -> tuple[str, ...]:
        """Return the words that the run's checkpoints keep: those of groups with options. Placement is always today's."""
        sides = key_sides(config)
        found = (word for word in self.typed if _group(word) in OPTIONS and _may_be_kept(word))
        return *self.held, *(word for word in found if sides.get(_key(word)) is not Side.PLACEMENT)

    def notices(self, coming: Sequence[Stage]) -> Iterator[str]:
        """Yield a notice of the words of earlier starts that hold for an option which a coming stage chooses."""
        chosen = {group for stage in coming for group in OPTIONS if {group, f"{group}.name"} & set(stage.changes)}
        said = [word for word in self.held if _group(word) in chosen]
        if said:
            yield f"typed at an earlier start, and held for the options that stages choose: {' '.join(said)}"


def held_words(state: Mapping[str, Any], typed: Sequence[str]) -> list[str]:
    """Return the words that a checkpoint's state keeps, without those over which the words typed now hold.

    A word holds over an earlier one of its key. The choice of an option ends all words of its group, unless it is the option
    that was typed earlier, or that the checkpoint has.
    """
    words = [word for word in state.get("typed", []) if _may_be_kept(word) and _is_readable(word)]
    now, before, recorded = typed_values(typed), typed_values(words), state.get("choices", {})
    ended = {group for group in OPTIONS if group in now and now[group] not in (before.get(group), recorded.get(group))}
    inside = tuple(f"{key}." for key in (*ended, *(key for key in now if key not in OPTIONS)))
    return [word for word in words if _key(word) not in now and not _key(word).startswith(inside)]


def _may_be_kept(word: str) -> bool:
    return not any(text in word for text in UNKEPT)


def _is_readable(word: str) -> bool:
    """Return whether a checkpoint's word can be parsed; warn of one that can't, as another version's may."""
    try:
        typed_values([word])
    except OverrideParseException:
        log.warning("the checkpoint keeps a word of an earlier start that can't be read, and it is left out: %s", word)
        return False
    return True


def _key(word: str) -> str:
    """Return the key that a word sets; "" for an override of Hydra's own."""
    return next(iter(typed_values([word])), "")


def _group(word: str) -> str:
    return _key(word).partition(".")[0]
