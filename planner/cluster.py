"""Config of `cluster`: the machines that a plan is made for. Imports no torch.

`cluster=h100x512` is the recipe `h100` with 512 GPUs; `cluster.price=2` changes a key. A cluster is no part of a run's config:
only plans read it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..config.cache import cache_folder
from ..config.compose import RECIPE_FOLDER
from ..config.keys import MISSING, Side, key, keys_of
from ..config.problems import ConfigError, Problem

GROUP = "cluster"
GIB = 2**30
UNMEASURED = 0.25
"""Share by which a time may be off that was predicted from data sheets."""


@dataclass(frozen=True)
class NetworkCards:
    """Network cards of one kind in a node."""

    SIDE: ClassVar[Side] = Side.PLACEMENT

    count: int = key(MISSING, "cards of this kind in a node")
    gbit: float = key(MISSING, "Gbit/s of each, in each direction")


@dataclass(frozen=True)
class Island:
    """Nodes with a network of their own kind; islands follow each other in the order of ranks (Holmes, arXiv 2312.03549)."""

    SIDE: ClassVar[Side] = Side.PLACEMENT

    nodes: int = key(MISSING, "nodes of the island")
    gbit: float = key(MISSING, "Gbit/s of a node to the others of its island, all cards together")


@dataclass(frozen=True)
class Rates:
    """Shares of the data sheet's figures that kernels and links reach. `meshloom calibrate` measures them on a machine.

    The defaults are an H100's or H200's, with this program's kernels.
    """

    SIDE: ClassVar[Side] = Side.PLACEMENT

    speed: float = key(1.0, "factor on the speed of all kernels, by which measured steps are fitted")
    products: float = key(0.80, "share of the peak that a large matrix product reaches")
    float8: float = key(0.62, "share of float8's peak that a large product reaches, casts not included")
    half_area: float = key(1.0e6, "elements of a product's output at which half of its time is spent on filling the GPU")
    grouped: float = key(0.85, "speed of experts' grouped products, of that of one product of their size")
    attention: float = key(0.66, "share of the peak of attention's forward pass at head width 128, masked scores not counted")
    attention_backward: float = key(0.57, "the same of its backward pass")
    half_width: float = key(28.0, "head width at which attention reaches half the rate of endless heads")
    half_length: float = key(350.0, "positions of a document at which attention reaches half the rate of endless ones")
    memory: float = key(0.88, "share of the memory's bandwidth that pointwise kernels reach")
    tail: float = key(5.0e-6, "seconds that the beginning and the end of a kernel take")
    launch: float = key(
        1.45e-3, "seconds in which the host launches a compiled block's forward pass; twice as long for the backward pass"
    )
    launch_eager: float = key(
        2.5 * 1.45e-3, "the same of a block that is not compiled; by default as many times longer as it has more kernels"
    )
    link: float = key(0.80, "share of its bandwidth that a collective reaches inside a node")
    network: float = key(0.80, "the same across nodes")
    latency: float = key(3.0e-6, "seconds that each further rank inside a node adds to a collective")
    network_latency: float = key(8.0e-6, "seconds that each further node adds to a collective")
    contention: float = key(0.7, "part of what hidden collectives take at a node's links that computation loses to them")
    jitter: float = key(0.008, "share of a step that is lost to waiting for the slowest rank, for every doubling of nodes")

    def problems(self, key: str) -> Iterator[Problem]:
        """Yield what is wrong with the values."""
        shares = ("products", "float8", "attention", "attention_backward", "memory", "link", "network")
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if not (math.isfinite(value) and value >= 0) or (each.name in (*shares, "speed", "grouped") and value == 0):
                yield Problem(f"{key}.{each.name}", f"{value} can't be", "use a positive number")
            elif each.name in shares and value > 1:
                yield Problem(f"{key}.{each.name}", f"{value:g} is more than all", "use a share, up to 1")


@dataclass(frozen=True)
class ClusterConfig:
    """Machines of one kind and the network between them. Rates are per GPU and, of links, in each direction."""

    SIDE: ClassVar[Side] = Side.PLACEMENT

    gpu: str = key(MISSING, "name of the GPU")
    gpus: int = key(8, "GPUs of the whole cluster")
    gpus_per_node: int = key(8, "GPUs that one node's links connect")
    memory: float = key(MISSING, "GiB of a GPU that programs can have")
    bf16: float = key(MISSING, "peak TFLOP/s of dense bf16 products")
    fp8: float | None = key(None, "peak TFLOP/s of float8 products; null: it has none")
    fp32: float = key(MISSING, "peak TFLOP/s of fp32 products")
    fp64: float = key(MISSING, "peak TFLOP/s of fp64 products")
    bandwidth: float = key(MISSING, "TB/s of a GPU's memory")
    link: float = key(MISSING, "GB/s of a GPU to the others of its node")
    nics: list[NetworkCards] = key([], "network cards of a node, by kind")
    islands: list[Island] = key([], "parts of the cluster with networks of their own; none: one network")
    between: float = key(0.0, "Gbit/s of a node to another island's")
    host_memory: float = key(MISSING, "GiB of memory of a node's host")
    host_link: float = key(25.0, "GB/s between a GPU and its host's memory")
    disk: float = key(2.0, "GB/s of a node's local disk")
    price: float | None = key(None, "price of a GPU-hour; null: plans tell no cost")
    calibrated: bool = key(False, "whether rates of kernels were measured on these machines")
    link_calibrated: bool = key(False, "whether collectives were measured inside a node")
    network_calibrated: bool = key(False, "whether collectives were measured across nodes")
    rates: Rates = field(default_factory=Rates)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def measured(self) -> bool:
        """Return whether the rates of all that this many GPUs use were measured: kernels, links of a node, the network."""
        linked = min(self.gpus, self.gpus_per_node) == 1 or self.link_calibrated
        return self.calibrated and linked and (self.nodes == 1 or self.network_calibrated)

    @property
    def band(self) -> float:
        """Share by which a predicted time may be off: more where rates are data sheets' than where they were measured."""
        return 0.10 if self.measured else UNMEASURED

    @property
    def node_network(self) -> float:
        """Bytes per second of a node to the network, all of its cards together."""
        return sum(cards.count * cards.gbit for cards in self.nics) * 1e9 / 8

    def peak(self, precision: str) -> float:
        """FLOP/s of products in a precision of the config, or `fp8`."""
        return (getattr(self, precision) or 0.0) * 1e12

    def problems(self, key: str = GROUP) -> list[Problem]:
        """Return what is wrong with the values."""
        return [*self._numbers(key), *self._networks(key), *self.rates.problems(f"{key}.rates")]

    def _numbers(self, key: str) -> Iterator[Problem]:
        for name in ("gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                yield Problem(f"{key}.{name}", f"{getattr(self, name)} is not a number of GPUs", "use 1 or more")
        for name in ("memory", "bf16", "fp32", "fp64", "bandwidth", "link", "host_memory", "host_link", "disk", "fp8"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                yield Problem(f"{key}.{name}", f"{value:g} can't be", "use a number above 0")
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            yield Problem(f"{key}.price", f"{self.price:g} is no price", "use 0 or more, or null")
        if self.gpus > self.gpus_per_node >= 1 and self.gpus % self.gpus_per_node:
            text = f"{self.gpus} GPUs are no whole number of nodes of {self.gpus_per_node}"
            yield Problem(f"{key}.gpus", text, f"use a multiple of {self.gpus_per_node}, or change {key}.gpus_per_node")

    def _networks(self, key: str) -> Iterator[Problem]:
        kinds = [("nics", [(cards.count, cards.gbit) for cards in self.nics])]
        kinds += [("islands", [(island.nodes, island.gbit) for island in self.islands])]
        for name, counted in kinds:
            for at, (count, gbit) in enumerate(counted):
                if count < 1 or not 0 < gbit < math.inf:
                    yield Problem(f"{key}.{name}[{at}]", f"{count} × {gbit:g} Gbit/s can't be", "use positive numbers")
        if self.gpus_per_node >= 1 and self.nodes > 1 and not self.nics and not self.islands:
            fix = f"give {key}.nics, for example [{{count: 8, gbit: 400}}]"
            yield Problem(f"{key}.nics", f"{self.nodes} nodes, and nothing connects them", fix)
        if not self.islands:
            return
        nodes = sum(island.nodes for island in self.islands)
        if nodes != self.nodes:
            fix = f"let the islands have {self.nodes} nodes together, or change {key}.gpus"
            yield Problem(f"{key}.islands", f"they have {nodes} nodes, and the cluster {self.nodes}", fix)
        if len(self.islands) > 1 and not self.between > 0:
            yield Problem(f"{key}.between", "nothing connects the islands", "give it in Gbit/s of a node")


def is_cluster_word(word: str) -> bool:
    """Return whether a word of the command line names the cluster, or one of its keys."""
    return word.partition("=")[0] == GROUP or word.startswith(f"{GROUP}.")


def load_cluster(words: Sequence[str], config_dir: str | None = None) -> ClusterConfig:
    """Return the cluster of the words `cluster=…` and `cluster.key=…`. Raises ConfigError with all of their problems."""
    chosen, changes = "", dict[str, Any]()
    problems: list[Problem] = []
    for word in words:
        name, _, written = word.partition("=")
        if name == GROUP:
            chosen = written
            continue
        try:
            changes[name.removeprefix(f"{GROUP}.")] = yaml.safe_load(written)
        except yaml.YAMLError:
            problems.append(
                Problem(name, f"{written} is no YAML", "close its brackets and quotes, as in [{count: 8, gbit: 400}]")
            )
    if not chosen:
        raise ConfigError([Problem(GROUP, "is not chosen", f"add {GROUP}=…; there are: {', '.join(options(config_dir))}")])
    values = _recipe(chosen, config_dir)
    for name, value in changes.items():
        group, _, leaf = name.rpartition(".")
        keys = _group(values, group)
        if keys is None:
            problems.append(Problem(f"{GROUP}.{name}", f"{GROUP}.{group} has no keys of its own", f"write {GROUP}.{group}=…"))
        else:
            keys[leaf] = value
    cluster = _typed(ClusterConfig, values, GROUP, problems)
    problems += cluster.problems() if cluster is not None and not problems else []
    if problems:
        raise ConfigError(problems)
    assert cluster is not None
    return cluster


def _group(values: dict[str, Any], group: str) -> dict[str, Any] | None:
    """Return the dictionary of a group's keys, made where the group is empty; None for what has no keys."""
    if not group:
        return values
    if values.get(group) is None:
        values[group] = dict[str, Any]()
    found = values[group]
    return typing.cast(dict[str, Any], found) if isinstance(found, dict) else None


def profile_folder() -> Path:
    """Return the folder of clusters that `meshloom calibrate` has measured."""
    return cache_folder(None) / GROUP


def _folders(config_dir: str | None) -> list[Path]:
    return [*([Path(config_dir) / GROUP] if config_dir else []), profile_folder(), RECIPE_FOLDER / GROUP]


def recipes() -> list[str]:
    """Return the names of the clusters that Meshloom has recipes of."""
    return sorted(file.stem for file in (RECIPE_FOLDER / GROUP).glob("*.yaml"))


def options(config_dir: str | None = None) -> list[str]:
    """Return the names of all clusters."""
    return sorted({file.stem for folder in _folders(config_dir) for file in folder.glob("*.yaml")})


def _recipe(name: str, config_dir: str | None, above: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a cluster's values; `<name>x<GPUs>` is the cluster of that name with so many GPUs.

    above: the files that are based on it. They are passed over, so that one's own `h100` may extend the recipe `h100`.
    """
    folders = _folders(config_dir)
    files = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.yaml") if file not in above}
    sized = re.fullmatch(r"(.+)x(\d+)", name)
    found = name if name in files else sized[1] if sized and sized[1] in files else None
    if found is None:
        if above:
            raise ConfigError([Problem(GROUP, f"{above[-1]} extends '{name}', which is no other cluster", _mend(files))])
        near = difflib.get_close_matches(sized[1] if sized else name, files, 1)
        size = f"x{sized[2]}" if sized else ""
        hint = f"did you mean {GROUP}={near[0]}{size}? " if near else ""
        raise ConfigError([Problem(GROUP, f"there is no '{name}'", f"{hint}There are: {', '.join(sorted(files))}")])
    file = files[found]
    values = _read(file)
    bases = values.pop("defaults", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in typing.cast(list[Any], bases)):
        raise ConfigError([Problem(GROUP, f"{file}: defaults: {bases!r} is no list of clusters", _mend(files))])
    for base in typing.cast(list[str], bases):
        if base != "_self_":
            values = _merged(_recipe(base, config_dir, [*above, file]), values)
    if found != name and sized:
        values["gpus"] = int(sized[2])
    return values


def _mend(files: Mapping[str, Path]) -> str:
    return f"write for example defaults: [h100]; there are: {', '.join(sorted(files))}"


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([Problem(GROUP, f"{file} can't be read: {error}", "mend the file")]) from error
    if not isinstance(values, dict):
        raise ConfigError([Problem(GROUP, f"{file} has no keys", "write key: value")])
    return typing.cast(dict[str, Any], values)


def _merged(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        name: {**base[name], **(value or {})}
        for name, value in values.items()
        if isinstance(base.get(name), dict) and (value is None or isinstance(value, dict))
    }
    return {**base, **values, **both}


def _typed(kind: Any, values: Any, key: str, problems: list[Problem]) -> Any:
    """Make a dataclass of plain values; append a problem for each key that is unknown, missing or of another type."""
    if not isinstance(values, dict):
        problems.append(Problem(key, f"{values!r} has no keys", f"give {', '.join(one.name for one in keys_of(kind))}"))
        return None
    hints, known = typing.get_type_hints(kind), {one.name: one for one in dataclasses.fields(kind)}
    given = dict[str, Any]()
    for name, value in typing.cast(dict[str, Any], values).items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            fix = f"did you mean {key}.{near[0]}?" if near else f"{key} has: {', '.join(known)}"
            problems.append(Problem(f"{key}.{name}", "there is no such key", fix))
        else:
            given[name] = _value(hints[name], value, f"{key}.{name}", problems)
    missing = [name for name, one in known.items() if one.default is MISSING and name not in given]
    problems += [Problem(f"{key}.{name}", "is not set", f"give {known[name].metadata['meaning']}") for name in missing]
    return None if problems else kind(**given)


def _value(hint: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _typed(hint, value, key, problems)
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        if not isinstance(value, list):
            problems.append(Problem(key, f"{value!r} is no list", f"write [{{{', '.join(k.name for k in keys_of(inner))}}}]"))
            return []
        return [_typed(inner, one, f"{key}[{at}]", problems) for at, one in enumerate(typing.cast(list[Any], value))]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if float in kinds:
            return float(value)
        if int in kinds and math.isfinite(value) and value == int(value):
            return int(value)
    if bool in kinds and isinstance(value, bool):
        return value
    if str in kinds and isinstance(value, str):
        return value
    problems.append(Problem(key, f"{value!r} is not of its type", f"give a {' or '.join(k.__name__ for k in kinds)}"))
    return None
