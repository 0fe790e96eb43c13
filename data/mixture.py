"""The data node of `data=mixture`: several nodes of the group as one, with one tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import xxhash

from ..config.cache import cache_folder
from ..config.hashing import hash64
from ..config.problems import ConfigError, Problem
from .blend import MixedSamples, MixedValidationSamples, apportion
from .build import build_source
from .config import MixtureConfig
from .corpus import Corpus, TokenizerSettings
from .node import DataNode
from .tokenizer import Tokenizer

# Keys that the mixture sets for all its sources that have them.
SHARED = ("seq_len", "document_mask", "verify", "cache_dir", "tokenizer", "vocabulary", "tokenizer_sample", "end_of_document")

FIX = "name some in a recipe's defaults: /data@sources.code: stdlib"


class Mixture:
    """Several data nodes as one. See `meshloom.data.config.MixtureConfig` for the keys.

    Sources that start from documents share the tokenizer that `tokenizer` names (bpe: trained on equal parts of all of
    them). If a source brings tokens of its own (shards), all sources use its tokenizer.
    """

    def __init__(self, config: MixtureConfig, seed: int) -> None:
        self.seed = seed
        self.seq_len = config.seq_len
        self.weights = dict(config.weights)
        self.block = config.block
        self._config = config
        self._cache = cache_folder(config.cache_dir)
        self._settings = TokenizerSettings.of(config)
        self._no_sources = {name: node for name, node in config.sources.items() if not isinstance(node, Mapping)}
        self._written: dict[str, dict[str, Any]] = {
            name: dict(node) for name, node in config.sources.items() if name not in self._no_sources
        }
        self.nodes = {name: self._source(name, node) for name, node in self._written.items()}
        self._tokenizer: Tokenizer | None = None
        self._is_prepared = False

    def _source(self, name: str, node: dict[str, Any]) -> DataNode:
        shared = {key: getattr(self._config, key) for key in SHARED if key in node}
        # The order of a source must not change when another one comes or goes: its seed comes from its name.
        return build_source({**node, **shared}, self.seq_len, hash64(self.seed, *name.encode()))

    def problems(self, key: str = "data") -> list[Problem]:
        """Return what is wrong with the node's keys and with those of its sources."""
        found = self._settings.problems(key)
        found += [Problem(f"{key}.sources.{name}", f"{node} is no source", FIX) for name, node in self._no_sources.items()]
        if not self.nodes and not self._no_sources:
            found.append(Problem(f"{key}.sources", "there are none", FIX))
        for name in self.weights.keys() - self.nodes.keys() - self._no_sources.keys():
            found.append(Problem(f"{key}.weights.{name}", "there is no such source", f"use {', '.join(self.nodes)}"))
        for name, node in self.nodes.items():
            weight = self.weights.get(name)
            if weight is None or not 0 < weight < math.inf:
                what = "is not given" if weight is None else f"{weight} is no share"
                found.append(Problem(f"{key}.weights.{name}", what, "give a number above 0, or take the source out"))
            defaults = MixtureConfig()
            for shared in SHARED:
                value = self._written[name].get(shared)
                if value not in (None, getattr(self._config, shared), getattr(defaults, shared)):
                    where = f"{key}.sources.{name}.{shared}"
                    found.append(Problem(where, "is the same for all sources", f"set {key}.{shared}={value} instead"))
            for problem in node.problems(f"{key}.sources.{name}"):
                leaf = problem.key.removeprefix(f"{key}.sources.{name}.")
                shared = replace(problem, key=f"{key}.{leaf}") if leaf in SHARED else problem
                found += [shared] if shared not in found else []
        if not found and 0 in self._counts():
            smallest = min(self.weights.values()) / sum(self.weights.values())
            fix = f"use {round(1 / smallest)} or more"
            found.append(Problem(f"{key}.block", f"a share of {smallest:.2g} is no sample in {self.block}", fix))
        return found

    def _counts(self) -> list[int]:
        return apportion([self.weights[name] for name in self.nodes], self.block)

    def prepare(self) -> None:
        """Build or find the tokenizer and every source's shards."""
        corpora = {name: node for name, node in self.nodes.items() if isinstance(node, Corpus)}
        sources = [node.source for node in corpora.values()]
        if self._settings.setting != "bpe":
            self._tokenizer = self._settings.make(sources, self._cache)
        for name, node in self.nodes.items():
            if name not in corpora:
                node.prepare()
                self._adopt(node.tokenizer, name)
        if corpora:
            self._tokenizer = self._tokenizer or self._settings.make(sources, self._cache)
            for name, node in corpora.items():
                node.prepare_with(self._tokenizer, f"data.sources.{name}")
        sizes = {name: node.vocabulary for name, node in self.nodes.items()}
        if len(set(sizes.values())) > 1:
            raise ConfigError([Problem("data.sources", f"vocabularies differ: {sizes}", "tokenise all with one tokenizer")])
        self._is_prepared = True

    def _adopt(self, tokenizer: Tokenizer | None, name: str) -> None:
        if tokenizer is None:
            return
        if self._tokenizer is not None and self._tokenizer.fingerprint != tokenizer.fingerprint:
            fix = "tokenise all with one tokenizer"
            raise ConfigError([Problem(f"data.sources.{name}", "its tokens come from another tokenizer", fix)])
        self._tokenizer = tokenizer

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
        return MixedSamples([node.train() for node in self._prepared()], self._counts(), hash64(self.seed, 0))

    def validation(self) -> MixedValidationSamples | None:
        """Return the validation samples of the sources that have some, mixed by weight until one of them ends."""
        held = [(node.validation(), self.weights[name]) for name, node in zip(self.nodes, self._prepared(), strict=True)]
        having = [(samples, weight) for samples, weight in held if samples is not None]
        return MixedValidationSamples([samples for samples, _ in having], [weight for _, weight in having]) if having else None
