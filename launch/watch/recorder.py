"""PyTorch's flight recorder: ask the ranks of this host for what they have queued, and find the collective that some lack.

NCCL's own watchdog thread writes a rank's dump when something is written into its pipe, also where Python hangs. A dump lists
the newest collectives of each process group, each with a number that all ranks of the group count alike.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DUMP_SECONDS = 3.0
DONE = "completed"


def recorder_environment(folder: Path) -> dict[str, str]:
    """Return the environment with which ranks dump what they have recorded into a folder when asked to."""
    prefix = str(folder / "flight-")
    return {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": prefix,
    }


def collect_dumps(folder: Path, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Ask ranks of this host for their dumps; return those that come within seconds, by rank."""
    asked: list[int] = []
    for rank in ranks:
        with contextlib.suppress(OSError):  # no pipe, or nobody reads it: no NCCL
            (folder / f"flight-{rank}").unlink(missing_ok=True)  # of an attempt before
            pipe = os.open(folder / f"flight-{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            os.write(pipe, b"1\n")
            os.close(pipe)
            asked.append(rank)
    found: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + DUMP_SECONDS
    while len(found) < len(asked) and time.monotonic() < deadline:
        time.sleep(0.1)
        for rank in asked:
            with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):  # not there, or still being written
                found[rank] = pickle.loads((folder / f"flight-{rank}").read_bytes())
    return found


def read_dumps(dumps: Mapping[int, Mapping[str, Any]]) -> str:
    """Say which collective is the first that some ranks lack; "" if there is none, or fewer than two dumps."""
    if len(dumps) < 2:
        return ""
    groups: dict[tuple[str, ...], dict[int, dict[int, Mapping[str, Any]]]] = {}
    for rank, dump in dumps.items():
        for entry in dump.get("entries", ()):
            if not entry.get("is_p2p"):
                numbers = groups.setdefault(tuple(entry["process_group"]), {}).setdefault(rank, {})
                numbers[entry["collective_seq_id"]] = entry
    stuck: list[tuple[int, str]] = []
    for group, by_rank in groups.items():
        if len(by_rank) < 2:
            continue
        newest = {rank: max(numbers) for rank, numbers in by_rank.items()}
        number = min(newest.values()) + 1
        having = {rank: numbers[number] for rank, numbers in by_rank.items() if number in numbers}
        missing = sorted(set(by_rank) - set(having))
        if not having:  # all have queued the same: the first that some device has not begun
            number, having, missing = _not_begun(by_rank)
        if having and missing:
            entry = next(iter(having.values()))
            sizes = " ".join("×".join(map(str, size)) for size in entry.get("input_sizes", ()))
            name = f"{entry['profiling_name']} ({sizes}), number {number} of group {group[-1]}"
            told = f"{name}: not joined by rank {', '.join(map(str, missing))}"
            stuck.append((entry["time_created_ns"], told))
    return min(stuck)[1] if stuck else ""


def _not_begun(
    by_rank: Mapping[int, Mapping[int, Mapping[str, Any]]],
) -> tuple[int, dict[int, Mapping[str, Any]], list[int]]:
    """Return the first collective that some devices have begun and others have not: its number, those, and the others."""
    shared = set[int].intersection(*(set(numbers) for numbers in by_rank.values()))
    for number in sorted(shared):
        states = {rank: numbers[number]["state"] for rank, numbers in by_rank.items()}
        missing = sorted(rank for rank, state in states.items() if state == "scheduled")
        having = {rank: by_rank[rank][number] for rank, state in states.items() if state == "started"}
        if missing and having:
            return number, having, missing
    return 0, {}, []
