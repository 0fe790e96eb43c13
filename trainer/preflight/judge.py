"""Judge the reports of all ranks: against their peers, and against what their kind of device should give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median

from ...config.problems import ConfigError
from ...planner.cluster import ClusterConfig, load_cluster, recipes
from .measures import Report

OF_PEERS = 0.85
"""Share of the peers' median rate below which a device is slow."""
OF_LINKS = 0.5
"""Share of the median of links of its kind (inside a node, across nodes) below which a link is slow."""
OF_KIND = 0.75
"""Share of what its kind usually reaches below which a device is slow."""
CLOCK_SECONDS = 1.0


def findings(reports: Sequence[Report]) -> list[str]:
    """Return a sentence for each thing that is wrong, with who and how much. Reports are in the order of ranks."""
    found = [*_slow(reports, "product", lambda each: each.product, "TFLOP/s in a matrix product", 1e12)]
    found += _slow(reports, "copy", lambda each: each.copy, "GB/s in a copy", 1e9)
    found += _links(reports)
    found += [f"{each.host}: {each.storage}" for each in reports if each.storage]
    return [*found, *_clocks(reports), *_versions(reports)]


def usual_rate(device: str, what: str) -> float | None:
    """Return what a kind of GPU usually reaches, by its recipe of `cluster`: FLOP/s ("product") or bytes/s; None: not known."""
    cluster = _cluster(device)
    if cluster is None:
        return None
    return (
        cluster.bf16 * 1e12 * cluster.rates.products if what == "product" else cluster.bandwidth * 1e12 * cluster.rates.memory
    )


def _cluster(device: str) -> ClusterConfig | None:
    name = next((name for name in recipes() if name.upper() in device.upper().split()), None)
    try:
        return None if name is None else load_cluster([f"cluster={name}"])
    except ConfigError:
        return None


def _slow(reports: Sequence[Report], what: str, rate: Callable[[Report], float | None], unit: str, scale: float) -> list[str]:
    """Return the devices that are slower than others of their name, or than their kind should be. Not of processors."""
    found: list[str] = []
    for device in dict.fromkeys(each.device for each in reports if each.device != "processor"):
        alike = [(each, measured) for each in reports if each.device == device and (measured := rate(each)) is not None]
        if not alike:
            continue
        peers, kind = median([measured for _, measured in alike]), usual_rate(device, what)
        for each, measured in alike:
            told = f"rank {each.rank} ({each.host}, {device}) reaches {measured / scale:.4g} {unit}"
            if measured < OF_PEERS * peers:
                found.append(f"{told}; its peers {peers / scale:.4g}")
            elif kind is not None and measured < OF_KIND * kind:
                found.append(f"{told}; {kind / scale:.4g} is usual for its kind")
    return found


def _links(reports: Sequence[Report]) -> list[str]:
    hosts = {each.rank: each.host for each in reports}
    rates: dict[bool, list[tuple[int, int, float]]] = {True: [], False: []}
    for each in reports:
        for peer, measured in each.links.items():
            if each.rank < peer:
                rates[each.host == hosts[peer]].append((each.rank, peer, measured))
    found: list[str] = []
    for inside, links in rates.items():
        usual = median([measured for *_, measured in links]) if links else 0.0
        found += [
            f"the link of ranks {one} ({hosts[one]}) and {other} ({hosts[other]}) carries {measured / 1e9:.3g} GB/s;"
            f" {usual / 1e9:.3g} is usual {'inside a node' if inside else 'across nodes'}"
            for one, other, measured in links
            if measured < OF_LINKS * usual and reports[one].device != "processor"
        ]
    return found


def _clocks(reports: Sequence[Report]) -> list[str]:
    by_host = {each.host: each.clock for each in reports}
    middle = median(by_host.values())
    return [
        f"the clock of {host} is {abs(clock - middle):.1f} s {'ahead' if clock > middle else 'behind'}: set it by NTP"
        for host, clock in by_host.items()
        if abs(clock - middle) > CLOCK_SECONDS
    ]


def _versions(reports: Sequence[Report]) -> list[str]:
    by_host = {each.host: each.versions for each in reports}
    found: list[str] = []
    for name in dict.fromkeys(name for versions in by_host.values() for name in versions):
        there = {host: versions.get(name, "none") for host, versions in by_host.items()}
        usual, _ = Counter(there.values()).most_common(1)[0]
        others = [f"{host} has {version}" for host, version in there.items() if version != usual]
        if others:
            found.append(f"{name} is {usual} on most nodes, and {', '.join(others)}: install the same everywhere")
    return found
