"""Named validation sets: nodes of the group `data` beside the one that is trained on, each read whole and evaluated apart.

They are cut into tokens by the training data's tokenizer, and into samples of its length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ..config.cache import cache_folder
from ..config.nodes import Custom
from ..config.problems import ConfigError, Problem
from .build import build_source, system_problem
from .config import DataConfig
from .corpus import Packed
from .mixture import Mixture
from .node import DataNode
from .samples.order import StoredSamples, ValidationSamples
from .shards.manifest import ShardError
from .validation import ValidationPart, WeightedParts

SHARED = ("seq_len", "document_mask", "version", "cache_dir", "verify")
"""Keys that a set takes from the training data."""
FORM = "choose a kind of data in the recipe's defaults: /data@validation.<name>: text"


class ValidationSets:
    """The sets of a run, by name. config: `validation`; data: the config of the training data."""

    def __init__(self, config: Mapping[str, Any], data: DataConfig, seed: int) -> None:
        known = data.keys if isinstance(data, Custom) else vars(data)
        shared = {name: known[name] for name in SHARED if name in known}
        self._cache = cache_folder(shared.get("cache_dir"))
        self._taken = [f"data.sources.{name}" for name in data.nested]
        self._unbuilt: list[Problem] = []
        self.nodes: dict[str, DataNode] = {}
        for name, node in config.items():
            key = f"validation.{name}"
            if not isinstance(node, Mapping):
                self._unbuilt.append(Problem(key, f"{node!r} is no data", FORM))
                continue
            try:
                self.nodes[name] = build_source(cast(Mapping[str, Any], node), shared, seed, key)
            except ConfigError as error:
                self._unbuilt += error.problems
            except (ImportError, TypeError, ValueError, KeyError) as error:
                fix = f"check {key}._target_ and the keys of its node"
                self._unbuilt.append(Problem(key, f"can't be built: {error or type(error).__name__}", fix))

    def problems(self) -> list[Problem]:
        """Return what is wrong with the keys, without reading data."""
        found = list(self._unbuilt)
        for name, node in self.nodes.items():
            key = f"validation.{name}"
            if f"data.sources.{name}" in self._taken:
                found.append(Problem(key, "a source of the mixture has this name", "give the set another"))
            if isinstance(node, Mixture):
                found.append(Problem(key, "a mixture is no set", "name each of its sources as a set"))
            else:
                found += node.problems(key)
        return found

    def parts(self, data: DataNode) -> list[ValidationPart]:
        """Build or find the samples of every set. Their weight is 0: they are no part of the training data's loss.

        Raises ConfigError, naming the set, for what only the data show.
        """
        if self._unbuilt:
            raise ConfigError(self._unbuilt)
        found: list[ValidationPart] = []
        for name, node in self.nodes.items():
            key = f"validation.{name}"
            try:
                samples = _samples(node, data, key)
            except (ConfigError, ShardError):
                raise  # they name the key, or the file
            except ValueError as error:
                raise ConfigError([Problem(key, str(error))]) from error
            except OSError as error:
                raise ConfigError([system_problem(key, error, self._cache)]) from error
            if samples.vocabulary > data.vocabulary:
                message = f"it has a vocabulary of {samples.vocabulary}, and the training data {data.vocabulary}"
                raise ConfigError([Problem(key, message, "cut both into tokens by one tokenizer")])
            found.append(ValidationPart(name, 0.0, samples))
        return found


def _samples(node: DataNode, data: DataNode, key: str) -> StoredSamples:
    if isinstance(node, Packed):
        return ValidationSamples(node.whole(data.tokenizer, key))
    node.prepare()
    held = node.validation()
    if held is None or isinstance(held, WeightedParts):
        raise ConfigError([Problem(key, "it keeps no samples for validation", "give files, or shards")])
    return held
