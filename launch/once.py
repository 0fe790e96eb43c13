"""Print what every rank has to say once per node, and not once per rank."""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from types import TracebackType

from xxhash import xxh3_64_hexdigest

from ..config.per_host import attempt_folder

OWN = __name__.partition(".")[0]
"""The package whose hooks keep their whole traceback: theirs is a fault of Meshloom's."""


def is_first(text: str, repeat: int = 0) -> bool:
    """Return whether no other rank of this node has said this text; its n-th repetition by one rank is another text.

    The first rank to speak makes a file in the folder that they share. Ranks without one (torchrun makes it) all speak.
    """
    folder = attempt_folder()
    if folder is None:
        return True
    said = folder / f"said-{xxh3_64_hexdigest(text.encode())}-{repeat}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # rather twice than never
        return True
    return True


class OncePerNode(logging.Filter):
    """Drops warnings and errors of a log that another rank of this node has written."""

    def __init__(self) -> None:
        super().__init__()
        self._said: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write a record."""
        if record.levelno < logging.WARNING:
            return True
        text = record.getMessage()
        self._said[text] += 1
        return is_first(text, self._said[text])


def hook_failure(error: BaseException) -> str | None:
    """Return what to print for an error in a hook of the user's own: its name, the error, and where. None for any other."""
    from ..trainer.hooks.base import Hook

    place: TracebackType | None = error.__traceback__
    while place is not None:
        owner = place.tb_frame.f_locals.get("self")
        if isinstance(owner, Hook) and type(owner).__module__.partition(".")[0] != OWN:
            name = f"{type(owner).__module__}.{type(owner).__qualname__}.{place.tb_frame.f_code.co_name}"
            where = "".join(traceback.format_tb(place)).rstrip()
            return f"trainer.hooks: {name} failed: {type(error).__name__}: {error}\n{where}"
        place = place.tb_next
    return None
