"""Version of the rules by which documents become samples. A run keeps the version that it began with.

A change of which text a sample holds raises the version, and the rules before it stay, for runs that began with them.

1  until November 2026, and in every checkpoint that names none. Text is read with universal newlines and keeps a byte order
   mark; names of files end in lower case; documents are held out whole by their hash, and where none is, the first; of a long
   document each piece of a million characters is encoded by itself; best-fit packing makes samples of rests of one token
2  text is read as it stands, without a byte order mark; names end in any case; the share that is held out is the one that
   is asked for (`split.py`); long documents are encoded as a whole; a rest of one token is in no sample
3  a BPE tokenizer is trained on no document that is held out; where fill-in-the-middle and passages that are held out meet, no
   text with a copy is held out
"""

from __future__ import annotations

from typing import Any

from ..config.problems import Problem

NEWEST = 3


def version_problems(version: int, key: str) -> list[Problem]:
    """Return the problem of a version that this program does not know."""
    if 1 <= version <= NEWEST:
        return []
    return [Problem(f"{key}.version", f"version {version} is not known here", f"use 1 to {NEWEST}, or a newer Meshloom")]


def rules_version(node: Any) -> int | None:
    """Return the version by which a data node makes its samples; None for one without documents."""
    return getattr(node, "version", None)
