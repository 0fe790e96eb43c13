"""Fit the rates of a cluster to kernels and collectives that were measured on it. Imports no torch.

Each kind of kernel has the form of `kernel_time.py` or `network.py`. Their constants are found by least squares of relative
errors.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import yaml

from .cluster import ClusterConfig, Rates
from .kernel_time import HIDDEN, Kernels
from .network import node_bytes


@dataclass(frozen=True)
class Product:
    """A measured product (rows, inner) × (inner, out)."""

    rows: int
    out: int
    inner: int
    seconds: float


@dataclass(frozen=True)
class Attention:
    """Measured attention. flops: not masked, of a forward pass; length: of a document."""

    flops: float
    width: int
    length: float
    backward: bool
    seconds: float


@dataclass(frozen=True)
class Collective:
    """A measured all-gather of `size` bytes in all over `ranks` on `nodes`."""

    ranks: int
    nodes: int
    size: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """Measurements of a machine.

    copies  bytes per second that a pointwise kernel reads and writes, by size; host: between the GPU and its host
    blocks  (predict: rates → seconds of a block both ways, measured seconds)
    launches  seconds of a block both ways over so few tokens that the host alone counts, by whether it is compiled
    """

    precision: str = "bf16"
    products: list[Product] = field(default_factory=list[Product])
    attention: list[Attention] = field(default_factory=list[Attention])
    copies: list[float] = field(default_factory=list[float])
    host: list[float] = field(default_factory=list[float])
    collectives: list[Collective] = field(default_factory=list[Collective])
    blocks: list[tuple[Callable[[ClusterConfig], float], float]] = field(
        default_factory=list[tuple[Callable[[ClusterConfig], float], float]]
    )
    launches: dict[bool, float] = field(default_factory=dict[bool, float])


def calibrated(cluster: ClusterConfig, found: Measured) -> ClusterConfig:
    """Return the cluster with the rates that were measured; what was not measured keeps its rate."""
    rates = replace(cluster.rates, speed=1.0)
    if found.copies:
        rates = replace(rates, memory=min(1.0, max(found.copies) / (cluster.bandwidth * 1e12)))
    linked, networked = (
        any((each.nodes > 1) is across and each.ranks > 1 for each in found.collectives) for across in (False, True)
    )
    cluster = replace(cluster, rates=rates, calibrated=True, link_calibrated=linked, network_calibrated=networked)
    if found.host:
        cluster = replace(cluster, host_link=median(found.host) / 1e9)
    if found.products:
        cluster = _with(cluster, **_fit_products(cluster, found))
    if found.attention:
        cluster = _with(cluster, **_fit_attention(cluster, found))
    if found.collectives:
        cluster = _with(cluster, **_fit_collectives(cluster, found.collectives))
    names = {True: "launch", False: "launch_eager"}
    cluster = _with(cluster, **{names[compiled]: seconds / 3 for compiled, seconds in found.launches.items()})
    if found.blocks:
        # A block's time is inverse to the speed.
        logs = [math.log(predict(cluster) / seconds) for predict, seconds in found.blocks]
        cluster = _with(cluster, speed=math.exp(sum(logs) / len(logs)))
    return cluster


def block_errors(cluster: ClusterConfig, found: Measured) -> list[float]:
    """Return by how much each measured block differs from what the rates predict."""
    return [predict(cluster) / seconds - 1 for predict, seconds in found.blocks]


def _with(cluster: ClusterConfig, **rates: float) -> ClusterConfig:
    return replace(cluster, rates=replace(cluster.rates, **rates))


def _fit_products(cluster: ClusterConfig, found: Measured) -> dict[str, float]:
    """Fit seconds − traffic = (FLOPs + half_area · 2 · inner) / (peak · share), linear in 1/share and half_area/share."""
    kernels, peak = Kernels(cluster, found.precision), cluster.peak(found.precision)
    rows: list[tuple[float, float]] = []
    for each in found.products:
        elements = each.rows * each.inner + each.inner * each.out + each.rows * each.out
        left = max(each.seconds - kernels.pointwise((1 - HIDDEN) * kernels.unit * elements), 0.2 * each.seconds)
        # Relative to the measured time, so that small products count as much as large ones.
        rows.append((2 * each.inner * each.rows * each.out / peak / left, 2 * each.inner / peak / left))
    slope, tail = _least_squares(rows)
    share = min(1.0, 1 / slope)
    return {"products": share, "half_area": max(0.0, tail * share)}


def _least_squares(rows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Solve x·a + y·b = 1 for all rows in the least-squares sense, with a > 0 and b ≥ 0."""
    xx, xy, yy = (sum(p * q for p, q in pairs) for pairs in (
        [(x, x) for x, _ in rows], [(x, y) for x, y in rows], [(y, y) for _, y in rows]
    ))  # fmt: skip
    x, y = sum(x for x, _ in rows), sum(y for _, y in rows)
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy:
        a, b = (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant
        if a > 0 and b >= 0:
            return a, b
    return x / xx, 0.0


WIDTHS = (0.0, 8.0, 16.0, 28.0, 40.0, 64.0)
LENGTHS = (0.0, 50.0, 100.0, 200.0, 350.0, 600.0, 1000.0)


def _fit_attention(cluster: ClusterConfig, found: Measured) -> dict[str, float]:
    """Fit the shares of both passes, and the sizes of half the rate that explain the others best."""
    best: tuple[float, dict[str, float]] = (math.inf, {})
    for width, length in itertools.product(WIDTHS, LENGTHS):
        trial = {"half_width": width, "half_length": length, "attention": 0.5, "attention_backward": 0.5}
        kernels = Kernels(_with(cluster, **trial), found.precision)
        error = 0.0
        for key, backward in (("attention", False), ("attention_backward", True)):
            mine = [each for each in found.attention if each.backward is backward]
            if not mine:
                trial[key] = getattr(cluster.rates, key)
                continue
            logs = [
                math.log(kernels.attention(each.flops, each.width, each.length, backward=backward) / each.seconds)
                for each in mine
            ]
            mean = sum(logs) / len(logs)
            trial[key] = min(1.0, 0.5 * math.exp(mean))
            error += sum((log - mean) ** 2 for log in logs)
        if error < best[0] * (1 - 1e-9):
            best = error, trial
    return best[1]


def _fit_collectives(cluster: ClusterConfig, found: Sequence[Collective]) -> dict[str, float]:
    """Fit bandwidth and latency, inside a node and across nodes, of relative errors: a large message counts as a small one."""
    rates = dict[str, float]()
    for across in (False, True):
        rows: list[tuple[float, float]] = []
        mine = [each for each in found if (each.nodes > 1) is across and each.ranks > 1]
        for each in mine:
            # A ring across nodes has the latency of each node's ranks, too (`network.group`).
            inside = rates.get("latency", cluster.rates.latency) * (each.ranks // each.nodes - 1) if across else 0.0
            left = max(each.seconds - inside, 0.2 * each.seconds)
            hops = (each.nodes if across else each.ranks) - 1
            rows.append((each.size * (each.ranks - 1) / each.ranks / left, hops / left))
        if not rows:
            continue
        inverse, latency = _least_squares(rows)
        peak = node_bytes(cluster, max(each.ranks for each in mine)) if across else cluster.link * 1e9
        share, hop = ("network", "network_latency") if across else ("link", "latency")
        rates |= {share: min(1.0, 1 / inverse / peak), hop: latency}
    return rates


def as_values(cluster: ClusterConfig) -> dict[str, Any]:
    """Return a cluster's keys; of its rates those that are no defaults, so that a default may change later."""
    values, defaults = dataclasses.asdict(cluster), dataclasses.asdict(Rates())
    values["rates"] = {name: value for name, value in values["rates"].items() if value != defaults[name]}
    return values


def as_yaml(cluster: ClusterConfig, comments: Sequence[str]) -> str:
    """Write a cluster as a recipe of its own."""
    values = as_values(cluster)
    values["rates"] = {name: float(f"{value:.4g}") for name, value in values["rates"].items()}
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    return "".join(f"# {line}\n" for line in comments) + text
