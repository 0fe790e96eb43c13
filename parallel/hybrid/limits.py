"""Limits of hybrid data parallelism, checked from the config alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...config.problems import Problem
from ..config import ParallelConfig
from .planning import row_unit


def hybrid_problems(
    parallel: ParallelConfig,
    *,
    masked: bool | None,
    halves: bool,
    cut_losses: Sequence[str],
    drops_tokens: bool,
    float8: str,
    keeps_all: bool,
) -> Iterator[Problem]:
    """Yield what can't be combined with `parallel.hdp`.

    masked        whether attention stays inside documents; None: it can't be told from the config
    halves        whether the optimizer compares halves of a batch
    cut_losses    keys by which the balance of experts counts samples or micro-batches
    drops_tokens  whether experts drop tokens beyond a part of a micro-batch's
    float8        trainer.float8
    keeps_all     whether blocks keep all activations (trainer.activation=none, no budget)
    """
    off = "or parallel.hdp=none"
    if parallel.engine != "torch":
        fix = f"use parallel.engine=torch, {off}"
        yield Problem("parallel.hdp", f"the {parallel.engine} engine can't share documents between ranks", fix)
    if parallel.cp > 1:
        text = "it shares long documents by itself, and short ones not at all"
        yield Problem("parallel.cp", text, f"use parallel.cp=1, {off}")
    if parallel.hdp_offload and parallel.pp > 1:
        text = "a pipeline runs other micro-batches between both passes of one"
        yield Problem("parallel.hdp_offload", text, "use false, or parallel.pp=1")
    if parallel.hdp_offload and not keeps_all:
        text = "it copies what blocks keep, and they are told to keep little"
        yield Problem("parallel.hdp_offload", text, "use false, or trainer.activation=none without a budget")
    if parallel.hdp_offload and parallel.offload != "none":
        text = f"both it and parallel.offload={parallel.offload} would fill the one link to the host"
        yield Problem("parallel.hdp_offload", text, "use false, or parallel.offload=none")
    if masked is False:
        text = "attention crosses documents, so that they can't be dealt apart"
        yield Problem("data.document_mask", text, f"set it to true, {off}")
    if halves:
        text = "it compares halves of the list of micro-batches, which hybrid data parallelism cuts by cost"
        yield Problem("optim", text, f"use another optimizer, {off}")
    for key in cut_losses:
        text = "shares per sample or micro-batch change when a step's documents are dealt by cost"
        yield Problem(key, text, f"use {'past or exact' if key == 'balance.counts' else '0'}, {off}")
    if drops_tokens:
        text = "which tokens are dropped depends on the micro-batch, which hybrid data parallelism cuts by cost"
        yield Problem("model.experts.capacity", text, f"use null, {off}")
    if float8 != "none":
        text = "scales are taken of each micro-batch, which hybrid data parallelism cuts by cost"
        yield Problem("trainer.float8", text, f"use none, {off}")


def capacity_problems(parallel: ParallelConfig, micro: int, seq_len: int, data_size: int) -> Iterator[Problem]:
    """Yield why a document that is as long as a sample does not fit into a row on each data rank."""
    given = parallel.hdp_tokens or micro * seq_len
    unit = 1 if parallel.hdp_tokens is None else row_unit(given, parallel.tp)
    capacity = given // unit * unit
    if seq_len > data_size * capacity:
        held = f"a row on each data rank, a multiple of {unit}, holds {data_size} × {capacity}"
        text = f"a document may have {seq_len} tokens (data.seq_len), and {held}"
        least = -(-seq_len // (data_size * unit)) * unit
        yield Problem("parallel.hdp_tokens", text, f"use {least} or more, or start more processes")
