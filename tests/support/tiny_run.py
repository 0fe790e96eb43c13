"""Tiny runs from the command line's words to their end."""

from __future__ import annotations

from meshloom.trainer.resolve import ResolvedRun
from meshloom.trainer.run import run
from support.configs import resolve_words

SYNTHETIC = ["data=synthetic", "data.vocabulary=61", "data.seq_len=16", "data.validation_samples=12"]


ANY_DATA = [
    "recipe=quickstart",
    "model.dim=16",
    "model.layers=2",
    "model.heads=2",
    "model.kv_heads=1",
    "model.ffn_dim=24",
    "batch.samples=8",
    "batch.micro=2",
    "precision=fp64",
    "schedule=constant",
    "schedule.warmup=2",
    "checkpoint.mode=sync",
    "checkpoint.keep=0",
    "trainer.eval_every=4",
    "trainer.eval_samples=10",
    "trainer.sample_prompt=null",
    "logging.progress=false",
]


TINY = [*ANY_DATA, *SYNTHETIC]


def train(rank: int, world_size: int, words: list[str]) -> int:
    """`meshloom train` with these words, on ranks that are there already."""
    return run(resolve_words([], words, world_size))


def resolve_tiny(world_size: int, overrides: list[str]) -> ResolvedRun:
    base = ANY_DATA if any(override.startswith("data=") for override in overrides) else TINY
    return resolve_words(base, overrides, world_size)


def body(rank: int, world_size: int, overrides: list[str] | ResolvedRun) -> int:
    """Train on ranks that are there already. What `run_ranks` calls it for has been resolved once, as a host does it once."""
    return run(overrides if isinstance(overrides, ResolvedRun) else resolve_tiny(world_size, overrides))


body.prepare = lambda world_size, overrides: [resolve_tiny(world_size, overrides)]  # type: ignore[attr-defined]


def unpicklable_run(rank: int, world_size: int, overrides: list[str]) -> int:
    """Run as `body` does, with a resolved config that can't be sent to other ranks: a user's classes may be such."""

    def refuse(run: ResolvedRun, protocol: int) -> str:
        raise TypeError("this config can't be pickled")

    ResolvedRun.__reduce_ex__ = refuse  # the process ends with this  # pyright: ignore[reportAttributeAccessIssue]
    return body(rank, world_size, overrides)
