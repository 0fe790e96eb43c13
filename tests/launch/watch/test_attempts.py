"""The decision to start a run again that has failed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from meshloom.launch.exit_codes import BAD_CONFIG, DIVERGED, HUNG, NO_PROGRESS
from meshloom.launch.watch.attempts import Attempt, judge_attempts


def attempt(first: int, last: int, code: int = 137, rank: int | None = 1, error: str = "") -> Attempt:
    return Attempt(first, last, code, rank, "node-b", error)


TAKEN = "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: {},"
TAKEN += " useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"
OTHERS = "OSError: [Errno 98] Address already in use"

STORIES: dict[str, tuple[Sequence[Attempt], int, bool, int]] = {
    "a first failure": ([attempt(1, 6)], 3, True, 137),
    "no restarts are wanted": ([attempt(1, 6)], 0, False, 137),
    "restarts are used up": ([attempt(1, 6), attempt(5, 9)], 1, False, 137),
    "a config error is never tried again": ([attempt(0, 0, BAD_CONFIG)], 3, False, BAD_CONFIG),
    "a run that diverged ends by its own decision": ([attempt(1, 60, DIVERGED)], 3, False, DIVERGED),
    "once without progress": ([attempt(1, 6), attempt(5, 6)], 9, True, 137),  # it began later: there was a checkpoint
    "twice the same step": ([attempt(1, 6), attempt(1, 6), attempt(1, 6)], 9, False, NO_PROGRESS),
    "never as far as the first": ([attempt(1, 60), attempt(1, 6), attempt(1, 7)], 9, False, NO_PROGRESS),
    "each a step further": ([attempt(1, 6), attempt(1, 7), attempt(1, 8)], 9, True, 137),
    "each from a later checkpoint": ([attempt(1, 60), attempt(11, 15), attempt(13, 15)], 9, True, 137),
    "hangs": ([attempt(1, 6, HUNG), attempt(5, 9, HUNG)], 9, True, HUNG),
    "the same exception again": ([attempt(1, 6, 1, error="E: x"), attempt(1, 6, 1, error="E: x")], 9, False, NO_PROGRESS),
    "another exception": ([attempt(1, 6, 1, error="E: x"), attempt(1, 6, 1, error="E: y")], 9, True, 1),
    "the same exception later": ([attempt(1, 6, 1, error="E: x"), attempt(1, 9, 1, error="E: x")], 9, True, 1),
    "an exception in the very first step": ([attempt(1, 1, 1, error="E: x")], 3, False, 1),
    "a port that was taken before ranks met there": ([attempt(0, 0, 1, error=TAKEN.format(1))], 3, True, 1),
    "no restart for a port": ([attempt(0, 0, 1, error=TAKEN.format(1))], 0, False, 1),
    "ports that are taken always": ([attempt(0, 0, 1, error=TAKEN.format(port)) for port in range(3)], 9, False, NO_PROGRESS),
    "another port": ([attempt(0, 0, 1, error=OTHERS)], 3, False, 1),
    "killed in the very first step": ([attempt(1, 1)], 3, True, 137),
    "before any step": ([attempt(0, 0, 1), attempt(0, 0, 1), attempt(0, 0, 1)], 9, False, NO_PROGRESS),
}


@pytest.mark.parametrize("name", STORIES)
def test_a_story_of_attempts(name: str) -> None:
    attempts, restarts, again, code = STORIES[name]
    found = judge_attempts(attempts, restarts)
    assert (found.again, found.code) == (again, code) and found.said


def test_the_rank_that_always_fails_first_is_named() -> None:
    story = [attempt(1, 6, rank=0), *[attempt(5, 9)] * 3]
    assert "rank 1 (node-b) was the first to fail in each" in judge_attempts(story, 9).said
    assert "3 attempts came no further than step 9" in judge_attempts(story, 9).said
    assert "first to fail" not in judge_attempts([attempt(5, 9, rank=0), *[attempt(5, 9)] * 2], 9).said
