"""Sizes that context parallelism can cut. Imports no torch."""

from __future__ import annotations

from typing import Protocol

from ...config.problems import Problem
from ..config import CONTEXT_KINDS, ParallelConfig


class ContextParallelSizes(Protocol):
    """Sizes that must divide: fields of `DecoderConfig`."""

    heads: int
    kv_heads: int


def ring_problems(parallel: ParallelConfig, members: int) -> list[Problem]:
    """Say if queries would have to be handed on in a ring of so many members: they are only sent directly."""
    if parallel.ring_exchange != "queries" or members <= parallel.ring_direct:
        return []
    message = f"queries are not handed on, and a ring may have {members} members, more than parallel.ring_direct"
    fix = f"use keys, or parallel.ring_direct={members}, with which each has messages with all others"
    return [Problem("parallel.ring_exchange", message, fix)]


def context_problems(shape: ContextParallelSizes, parallel: ParallelConfig, seq_len: int) -> list[Problem]:
    """List everything that keeps samples of `seq_len` positions from being cut `parallel.cp` ways."""
    kind, cp = parallel.cp_kind, parallel.cp
    if kind not in CONTEXT_KINDS:
        return parallel.problems_of("cp_kind")
    if cp < 2:
        return []
    problems: list[Problem] = []
    if kind == "ring":
        problems += ring_problems(parallel, cp)
    elif parallel.ring_exchange != "keys":
        message = f"only a ring sends {parallel.ring_exchange}, and parallel.cp_kind is {kind}"
        problems.append(Problem("parallel.ring_exchange", message, "leave it keys, or use parallel.cp_kind=ring"))
    unit = 2 * cp if kind == "ring" else cp
    if seq_len % unit:
        longer = -(-seq_len // unit) * unit
        message = f"samples of {seq_len} positions (data.seq_len) can't be cut into {unit} equal parts"
        problems.append(Problem("parallel.cp", message, f"use data.seq_len={longer}, or another parallel.cp"))
    heads = shape.heads // parallel.tp
    if kind == "ulysses" and heads % cp:
        legal = [n for n in range(1, heads + 1) if heads % n == 0]
        after = f" that parallel.tp={parallel.tp} leaves on a rank" if parallel.tp > 1 else ""
        message = f"{heads} attention heads (model.heads){after} can't be dealt to {cp} ranks"
        fix = f"use parallel.cp_kind=ring, or parallel.cp={' or '.join(map(str, legal))}"
        problems.append(Problem("parallel.cp_kind", message, fix))
    return problems
