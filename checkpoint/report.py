"""The report of a save: outcome, sizes and times."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any


@dataclass
class SaveReport:
    """One save as this rank saw it. Times in seconds; `bytes` of this rank, `total_bytes` of all ranks (committed saves).

    outcome    committed (on the disk), kept (in memory only), skipped (the disk was busy), failed, or unkept (a snapshot for
               memory alone failed); `reason` says why it is not what was asked for
    culprit    of a failed save: the rank that has caused it; None: all alike, or not known
    stall      what training waited for: the call to save and the wait before the update (on a GPU, only where it had run out
               of queued work at their end), and the GPU's wait for the copies
    staging    copying into host memory, from the first copy to the last; hashing and writing follow it
    keeping    hashing and exchanging parity in the keepers
    commit     from the end of this rank's writing to the verdict: the other ranks, manifest, renames
    """

    step: int
    outcome: str = "failed"
    reason: str = ""
    culprit: int | None = None
    stall_seconds: float = 0.0
    staging_seconds: float = 0.0
    keeping_seconds: float = 0.0
    hashing_seconds: float = 0.0
    writing_seconds: float = 0.0
    commit_seconds: float = 0.0
    total_seconds: float = 0.0
    bytes: int = 0
    total_bytes: int = 0
    host_memory_bytes: int = 0
    direct: bool = False

    @property
    def gigabytes_per_second(self) -> float:
        """Rate of this rank's writing, 10⁹ bytes a second."""
        return self.bytes / self.writing_seconds / 1e9 if self.writing_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {**dataclasses.asdict(self), "gigabytes_per_second": self.gigabytes_per_second}

    def metrics(self) -> dict[str, float]:
        """The numbers, under names for metrics.jsonl and wandb."""
        numbers = {key: value for key, value in self.as_dict().items() if isinstance(value, int | float) and key != "culprit"}
        return {f"checkpoint/{key}": float(value) for key, value in numbers.items()}


def culprit_of(reason: str, rank: int) -> int | None:
    """Return the rank that a save has failed for; None if its reason leaves that open. rank: that saw it fail

    A time-out is told by the rank that has waited, and the one that is missing is at fault, if it is known. What another rank
    tells of itself begins with its number (`control.Round.abort`), and what comes from this rank does not.
    """
    if "no answer on" in reason:
        missing = re.search(r"missing: rank (\d+)(?!\d|, or)", reason)
        return int(missing[1]) if missing else None
    told = re.match(r"rank (\d+): ", reason)
    return int(told[1]) if told else rank
