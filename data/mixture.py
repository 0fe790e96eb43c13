"""The data node of `data=mixture`: several nodes of the group as one, with one tokenizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import xxhash

from ..config.cache import cache_folder
from ..config.hashing import hash64
from ..config.problems import ConfigError, Problem
from .batch import Samples
from .build import build_source
from .config import DataMixtureConfig
from .corpus import Corpus, Packed, TokenizerSettings
from .node import DataNode
from .samples.blend import MixedSamples, apportion
from .shards.manifest import ShardError
from .tokenizing.tokenizer import Tokenizer
from .validation import ValidationPart, WeightedParts, validation_parts
from .version import version_problems

log = logging.getLogger(__name__)

FIX = "name some in a recipe's defaults: /data@sources.code: stdlib"


class Mixture:
    """Several data nodes as one. See `meshloom.data.config.DataMixtureConfig` for the keys.

    Sources that start from documents share the tokenizer that `tokenizer` names (bpe: trained on equal parts of all of
    them). If a source brings tokens of its own (shards), all sources use its tokenizer.
    """

    def __init__(self, config: DataMixtureConfig, seed: int) -> None:
        self.seed = seed
        self.seq_len = config.seq_len
        self.version = config.version
        self.weights = config.named_weights
        self.block = config.block
        self._config = config
        self._cache = cache_folder(config.cache_dir)
        self._settings = TokenizerSettings.of(config)
        self._written: dict[str, dict[str, Any]] = {}
        self._unbuilt: list[Problem] = []
        self.nodes: dict[str, DataNode] = {}
        for name, node in config.named_sources.items():
            key = f"data.sources.{name}"
            if isinstance(node, Mapping):
                self._written[name] = dict(cast(Mapping[str, Any], node))
                self._build(name, key)
            else:
                self._unbuilt.append(Problem(key, f"{node} is no source", FIX))
        self._tokenizer: Tokenizer | None = None
        self._is_prepared = False

    def _build(self, name: str, key: str) -> None:
        try:
            # The order of a source must not change when another one comes or goes: its seed comes from its name.
            seed = hash64(self.seed, *name.encode())
            self.nodes[name] = build_source(self._written[name], self._config.shared, seed, key)
        except ConfigError as error:
            self._unbuilt += error.problems
        except (ImportError, TypeError, ValueError, KeyError) as error:
            fix = f"check {key}._target_ and the keys of its node"
            self._unbuilt.append(Problem(key, f"can't be built: {error or type(error).__name__}", fix))

    def problems(self, key: str = "data") -> list[Problem]:
        """Return what is wrong with the node's keys and with those of its sources."""
        found = self._settings.problems(key)
        found += version_problems(self.version, key)
        found += [replace(problem, key=f"{key}{problem.key.removeprefix('data')}") for problem in self._unbuilt]
        named = {*self._config.named_sources}
        if not named:
            found.append(Problem(f"{key}.sources", "there are none", FIX))
        for name in self.weights.keys() - named:
            found.append(Problem(f"{key}.weights.{name}", "there is no such source", f"use {', '.join(named)}"))
        for name, node in self.nodes.items():
            weight = self.weights.get(name)
            if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                what = "is not given" if weight is None else f"{weight} is no share"
                found.append(Problem(f"{key}.weights.{name}", what, "give a number, 0 for a source that is not read now"))
            defaults = DataMixtureConfig().shared
            for shared, common in self._config.shared.items():
                value = self._written[name].get(shared)
                if value not in (None, common, defaults[shared]):
                    where = f"{key}.sources.{name}.{shared}"
                    found.append(Problem(where, "is the same for all sources", f"set {key}.{shared}={value} instead"))
            for problem in node.problems(f"{key}.sources.{name}"):
                leaf = problem.key.removeprefix(f"{key}.sources.{name}.")
                shared = replace(problem, key=f"{key}.{leaf}") if leaf in self._config.shared else problem
                found += [shared] if shared not in found else []
        if named and not found and not any(self.weights.values()):
            found.append(Problem(f"{key}.weights", "all of them are 0", "give one source a share"))
        if self.block < 1:
            found.append(Problem(f"{key}.block", f"{self.block} is no number of samples", "use 1 or more"))
        elif not found and any(
            self.weights[name] and not count for name, count in zip(self.nodes, self._counts(), strict=True)
        ):
            smallest = min(filter(None, self.weights.values())) / sum(self.weights.values())
            fix = f"use {round(1 / smallest)} or more"
            found.append(Problem(f"{key}.block", f"a share of {smallest:.2g} is no sample in {self.block}", fix))
        return found

    def _counts(self) -> list[int]:
        return apportion([self.weights[name] for name in self.nodes], self.block)

    def prepare(self) -> None:
        """Build or find the tokenizer and every source's shards."""
        if self._unbuilt:
            raise ConfigError(self._unbuilt)
        corpora = {name: node for name, node in self.nodes.items() if isinstance(node, Corpus)}
        sources = [(node.source, node.asked_share) for node in corpora.values()]
        if self._settings.setting != "bpe":
            self._tokenizer = self._settings.make(sources, self._cache, self.version)
        for name, node in self.nodes.items():
            if name not in corpora:
                with _naming(f"data.sources.{name}"):
                    node.prepare()
                self._adopt(node.tokenizer, name)
        if corpora:
            if self._tokenizer is None:
                self._tokenizer = self._settings.make(sources, self._cache, self.version)
            for name, node in corpora.items():
                with _naming(f"data.sources.{name}"):
                    node.prepare_with(self._tokenizer)
        self._refuse_other_ends()
        sizes = {name: node.vocabulary for name, node in self.nodes.items()}
        if len(set(sizes.values())) > 1:
            raise ConfigError([Problem("data.sources", f"vocabularies differ: {sizes}", "tokenise all with one tokenizer")])
        self._is_prepared = True

    def _adopt(self, tokenizer: Tokenizer | None, name: str) -> None:
        if tokenizer is None:
            return
        if self._tokenizer is not None and self._tokenizer.fingerprint != tokenizer.fingerprint:
            fix = "tokenise all with one tokenizer and one end_of_document"
            what = "its tokens come from another tokenizer, or another token ends its documents"
            raise ConfigError([Problem(f"data.sources.{name}", what, fix)])
        self._tokenizer = tokenizer

    def _refuse_other_ends(self) -> None:
        """Raise ConfigError if another token ends the documents of a source; warn of shards without a tokenizer.

        Data of earlier versions of the rules are trained on, with a warning.
        """
        shards = {name: node.shards.manifest for name, node in self.nodes.items() if isinstance(node, Packed)}
        ends = {name: manifest.end_of_document for name, manifest in shards.items()}
        if len(set(ends.values()) - {None}) > 1:
            text = f"the tokens that end a document differ: {ends}"
            if self.version >= 3:
                raise ConfigError([Problem("data.sources", text, "tokenise all with one tokenizer and one end_of_document")])
            log.warning("data.sources: %s; a new run is refused for it", text)  # this one began before that was noticed
        unknown = [name for name, manifest in shards.items() if manifest.tokenizer is None]
        if unknown and self._tokenizer is not None:
            text = "data.sources.%s: its shards have no tokenizer.json, so nothing says that its tokens are those of the others"
            log.warning(text, ", ".join(unknown))

    def _prepared(self) -> list[DataNode]:
        if not self._is_prepared:
            raise RuntimeError("prepare() this data node before using it")
        return list(self.nodes.values())

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, once prepared."""
        self._prepared()
        return self._tokenizer

    @property
    def vocabulary(self) -> int:
        """Token ids lie in [0, vocabulary); known once prepared."""
        return self._prepared()[0].vocabulary

    @property
    def fingerprint(self) -> str:
        """Digest that names the data, once prepared."""
        content = [(name, node.fingerprint) for name, node in zip(self.nodes, self._prepared(), strict=True)]
        return xxhash.xxh3_128_hexdigest(repr([content, self._counts()]).encode())

    def train(self) -> MixedSamples:
        """Return the endless training samples; each source goes through its own epochs."""
        return self.mixed([node.train() for node in self._prepared()])

    def mixed(self, sources: Sequence[Samples]) -> MixedSamples:
        """Mix the training samples of the sources, which are given in the order of `nodes`."""
        return MixedSamples(sources, self._counts(), hash64(self.seed, 0))

    def validation(self) -> WeightedParts | None:
        """Return the validation samples of the sources that have some, apart and with their weights."""
        parts: list[ValidationPart] = []
        for name, node in zip(self.nodes, self._prepared(), strict=True):
            held = validation_parts(node)
            share = self.weights[name] / math.fsum(part.weight for part in held) if held else 0.0
            parts += [
                replace(part, name=f"{name}.{part.name}" if part.name else name, weight=share * part.weight) for part in held
            ]
        return WeightedParts(parts) if parts else None


@contextmanager
def _naming(key: str) -> Generator[None]:
    """Turn what a source raises into problems of its key."""
    try:
        yield
    except ConfigError as error:
        problems = [replace(problem, key=f"{key}{problem.key.removeprefix('data')}") for problem in error.problems]
        raise ConfigError(problems) from error
    except ShardError:
        raise  # it names the file
    except ValueError as error:
        raise ConfigError([Problem(key, str(error))]) from error
