"""Sizes that tensor parallelism can cut. Imports no torch."""

from __future__ import annotations

from typing import Protocol

from ...config.problems import Problem
from ..config import ParallelConfig


class TensorParallelSizes(Protocol):
    """Sizes that must divide: fields of `DecoderConfig`."""

    heads: int
    kv_heads: int
    ffn_dim: int
    vocabulary: int | None


def tensor_problems(shape: TensorParallelSizes, parallel: ParallelConfig, seq_len: int) -> list[Problem]:
    """List everything that keeps this model from being cut `parallel.tp` ways."""
    tp = parallel.tp
    if tp == 1:
        return []
    problems: list[Problem] = []
    vocabulary = shape.vocabulary
    legal = [
        n
        for n in range(1, shape.heads + 1)
        if _cuts(shape.heads, shape.kv_heads, n) and shape.ffn_dim % n == 0 and not _idle(vocabulary, n)
    ]
    fix = f"use parallel.tp={' or '.join(map(str, legal))}"
    if shape.heads % tp:
        said = f"{shape.heads} attention heads (model.heads) can't be dealt to {tp} ranks"
        problems.append(Problem("parallel.tp", said, fix))
    elif not _cuts(shape.heads, shape.kv_heads, tp):
        said = f"{shape.kv_heads} key/value heads (model.kv_heads) neither divide by {tp} ranks nor divide them"
        problems.append(Problem("parallel.tp", said, fix))
    if shape.ffn_dim % tp:
        problems.append(Problem("parallel.tp", f"model.ffn_dim={shape.ffn_dim} can't be cut into {tp} equal parts", fix))
    if _idle(vocabulary, tp):
        problems.append(Problem("parallel.tp", f"a vocabulary of {vocabulary} leaves some of {tp} ranks without a row", fix))
    if parallel.sequence_parallel and (seq_len // parallel.cp) % tp:
        problems.append(
            Problem(
                "parallel.sequence_parallel",
                f"{seq_len // parallel.cp} positions per rank can't be cut into {tp} equal parts",
                f"use a data.seq_len divisible by {parallel.cp * tp}, or parallel.sequence_parallel=false",
            )
        )
    return problems


def _idle(vocabulary: int | None, tp: int) -> bool:
    """Return whether a vocabulary cut into slices of equal length, but for the last, leaves a rank without a row."""
    return vocabulary is not None and -(-vocabulary // tp) * (tp - 1) >= vocabulary


def _cuts(heads: int, kv_heads: int, tp: int) -> bool:
    """Return whether each rank's query heads use whole key/value heads: its own, or one that it shares with its neighbours."""
    return heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
