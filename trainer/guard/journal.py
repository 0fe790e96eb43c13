"""The journal of a run's rewinds: from which step it went back, to which, and the samples that it leaves out since.

It lies beside the checkpoints, not in them: a rewind may go behind every checkpoint that would hold it. Checkpoints carry it,
too, for a run that branches off or whose folder is copied. So a resume anywhere leaves out the same samples (rule R1).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...checkpoint.errors import CheckpointError
from ...checkpoint.files import RemoteFiles, is_remote, open_files
from ...checkpoint.writing.disk import replace_small

log = logging.getLogger(__name__)

JOURNAL, ASIDE = "rewinds.json", "rewinds-before.json"


@dataclass(frozen=True)
class Rewind:
    """One rewind.

    step      at which it was decided, counted from 1
    to        the step whose state the run went back to
    ranges    samples left out since, as [first, end) pairs of the run's numbers
    reason    in one sentence
    data      fingerprint of the data whose samples these are
    in_place  whether the weights were still those before the step, so that nothing had to be restored
    copies    of a weight that did not agree: its "array", the "element" that differed, and "values", by rank, in hexadecimal
    """

    step: int
    to: int
    ranges: Sequence[Sequence[int]]
    reason: str
    data: str
    in_place: bool = False
    copies: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Journal:
    """The rewinds of a run, oldest first. All ranks have the same.

    data  fingerprint of the run's data: samples of other data are not left out
    """

    def __init__(self, data: str) -> None:
        self.data = data
        self.rewinds: list[Rewind] = []

    def is_left_out(self, index: int) -> bool:
        """Return whether the run leaves out the sample of this number."""
        return any(first <= index < end for each in self.rewinds if each.data == self.data for first, end in each.ranges)

    @property
    def left_out(self) -> int:
        """The number of samples that are left out."""
        return len({index for each in self.rewinds if each.data == self.data for r in each.ranges for index in range(*r)})

    def add(self, rewinds: Iterable[Mapping[str, Any]]) -> None:
        """Add rewinds, as JSON values, that it does not have yet."""
        for each in rewinds:
            rewind = Rewind(**each)
            if rewind not in self.rewinds:
                self.rewinds.append(rewind)

    def as_json(self) -> list[dict[str, Any]]:
        """Return the rewinds as JSON values."""
        return [asdict(each) for each in self.rewinds]

    def begin(self, folder: str) -> None:
        """Make the file in a folder of checkpoints this run's: that of another run is moved aside, unless taken over."""
        if self.rewinds:
            self.write(folder)
            return
        files = open_files(folder)
        if files.size(JOURNAL) is None:
            return
        if isinstance(files, RemoteFiles):
            files.write(ASIDE, files.read(JOURNAL))
            files.delete(JOURNAL)
        else:
            (files.path / JOURNAL).replace(files.path / ASIDE)
        text = "%s is another run's, for this one begins anew: it is %s now. To leave its samples out, begin with resume=auto"
        log.warning(text, files.label(JOURNAL), ASIDE)

    def write(self, folder: str) -> None:
        """Replace the file in a folder of checkpoints. Raises OSError."""
        data = json.dumps({"rewinds": self.as_json()}, indent=1).encode() + b"\n"
        files = open_files(folder)
        if isinstance(files, RemoteFiles):
            files.write(JOURNAL, data)
        else:
            files.path.mkdir(parents=True, exist_ok=True)
            replace_small(files.path / JOURNAL, data, "journal")


def read_journal(checkpoint: Path | str) -> list[dict[str, Any]]:
    """Return the rewinds, as JSON values, of the journal beside a checkpoint: a step's folder, or a folder of steps.

    Raises CheckpointError for one that can't be read: going on without it would meet the same samples again.
    """
    for place in (str(checkpoint), str(checkpoint).rstrip("/").rpartition("/")[0]):
        if not place or (is_remote(str(checkpoint)) and not is_remote(place)):
            continue
        files = open_files(place)
        try:
            found = json.loads(files.read(JOURNAL))["rewinds"]
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{files.label(JOURNAL)} is damaged ({error}): mend it, or move it away") from error
        for number, entry in enumerate(found):
            problem = _problem(entry)
            if problem is not None:
                raise CheckpointError(f"{files.label(JOURNAL)}: rewinds[{number}] {problem}: mend it, or move it away")
        return found
    return []


def _problem(entry: Any) -> str | None:
    """Return what is wrong with an entry that someone may have written by hand."""
    if not isinstance(entry, dict):
        return "is no object"
    names: set[str] = set(entry)  # pyright: ignore[reportUnknownArgumentType]
    known = {each.name for each in fields(Rewind)}
    missing = {"step", "to", "ranges", "reason", "data"} - names
    if missing or names - known:
        return f"lacks {', '.join(sorted(missing))}" if missing else f"has unknown {', '.join(sorted(names - known))}"
    for name, kind in (("step", int), ("to", int), ("reason", str), ("data", str), ("ranges", list)):
        if not isinstance(entry[name], kind):
            return f"has a {name} that is no {kind.__name__}"
    for each in entry["ranges"]:  # pyright: ignore[reportUnknownVariableType]
        if not (isinstance(each, list) and len(each) == 2 and all(isinstance(n, int) for n in each) and 0 <= each[0] < each[1]):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            return f"has a range {each} that is no [first, end) pair of sample numbers"
    return None
