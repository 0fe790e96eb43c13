"""Traits of the software that trains, as far as time depends on them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Software:
    """Traits of a training program.

    passes      memory traffic of pointwise kernels, against blocks whose kernels are fused by a compiler
    flash       whether attention's scores stay inside its kernel; otherwise they are written and read
    scores      times that scores cross memory in a forward pass where they do; a backward pass takes twice as many
    selective   what policy "selective" computes again: "product" (one of the feed-forward's, and what is pointwise), "products"
                (half of all), or "attention" (scores and weighted sums: arXiv 2205.05198)
    recomputes_last  whether policy "full" computes a block's last product again, which no backward pass reads
    float8_experts   whether routed experts are multiplied in float8 where the other products of blocks are
    tensor_overlap  part of tensor parallelism's exchanges that products hide
    launches    kernels of a block, against compiled blocks
    eager       whether blocks are not compiled, which the host launches in a time of their own
    overlaps    part of a pass beside which gathering and reducing may hide
    sums_received_rows  whether ranks send each other rows of gradients under ZeRO-1 and sum them; else they reduce-scatter
    reduces_late  whether gradients are reduced only after the last backward pass
    """

    passes: float = 1.0
    flash: bool = True
    scores: float = 6.0
    selective: str = "product"
    recomputes_last: bool = False
    float8_experts: bool = False
    tensor_overlap: float = 0.0
    launches: float = 1.0
    eager: bool = False
    overlaps: float = 0.9
    sums_received_rows: bool = False
    reduces_late: bool = False


COMPILED = Software(sums_received_rows=True)
"""This program with `trainer.compile`."""

EAGER = Software(sums_received_rows=True, passes=2.2, launches=2.5, eager=True)
"""This program without it: each pointwise operation is a kernel of its own."""
