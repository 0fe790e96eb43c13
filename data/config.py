"""Config of `data`: where tokens come from and how they become samples. One dataclass per option of the group.

Where data lie (paths, caches) is placement. Their fingerprint tells what they are; a resumed run compares it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

from ..config.keys import MISSING, Side, key, option, target
from ..config.nodes import Custom, find_option
from ..config.problems import Problem
from .version import NEWEST

SEQ_LEN = "positions per sample"
DOCUMENT_MASK = "attention stays inside documents"
VERIFY = "read all shards at the start and compare digests (sizes are compared in any case)"
CACHE_DIR = "where what is built is kept; null: $MESHLOOM_CACHE, else ~/.cache/meshloom"
TRAINED = "bpe"
"""Value of `tokenizer` that trains one on the corpus."""
TOKENIZER = "bpe: byte-level BPE trained on this corpus; bytes: a token per byte; or the path of a tokenizer.json"
VOCABULARY = "size of the trained BPE vocabulary"
TOKENIZER_SAMPLE = "characters of the corpus the tokenizer is trained on, at most"
END_OF_DOCUMENT = "the token that ends a document in a tokenizer.json; null: the well-known names are tried"
RULES = "version of the rules by which documents become samples; a resumed run keeps the one that it began with"
INPUT = "a path, glob pattern or folder, or a list of them"


@dataclass(frozen=True)
class DataConfig:
    """Keys of every option."""

    SIDE: ClassVar[Side] = Side.RECIPE

    _target_: str = target(MISSING)
    name: str = option(MISSING)
    seq_len: int = key(1024, SEQ_LEN)

    def problems(self, key: str = "data") -> list[Problem]:
        """Return what is wrong with the values. The data node itself checks the files."""
        if self.seq_len < 1:
            return [Problem(f"{key}.seq_len", f"{self.seq_len} is not a length", "use 1 or more")]
        return []

    @property
    def known_vocabulary(self) -> int | None:
        """The vocabulary's size, as far as the config says; the tokenizer may have fewer tokens."""
        return None

    @property
    def cache(self) -> str | None:
        """`cache_dir`, of options that have it."""
        return None

    @property
    def nested(self) -> Mapping[str, Any]:
        """Nodes of other options inside this one, by name."""
        return {}


@dataclass(frozen=True)
class CustomData(DataConfig, Custom):
    """Data of the user's own."""


@dataclass(frozen=True)
class CachedConfig(DataConfig):
    """Keys of every option whose samples come from token shards, which are built and cached where they are not given."""

    document_mask: bool = key(False, DOCUMENT_MASK)
    version: int = key(NEWEST, RULES)
    verify: bool = key(False, VERIFY, Side.HABIT)
    cache_dir: str | None = key(None, CACHE_DIR, Side.PLACEMENT)

    @property
    def cache(self) -> str | None:
        """The folder of what is built."""
        return self.cache_dir


@dataclass(frozen=True)
class TokenizedConfig(DataConfig):
    """Keys of every option that makes tokens of text."""

    tokenizer: str = key(TRAINED, TOKENIZER)
    vocabulary: int = key(4096, VOCABULARY)
    tokenizer_sample: int = key(100_000_000, TOKENIZER_SAMPLE)
    end_of_document: str | None = key(None, END_OF_DOCUMENT)

    @property
    def known_vocabulary(self) -> int | None:
        """The vocabulary's size; the tokenizer may have fewer tokens."""
        return self.vocabulary


@dataclass(frozen=True)
class PackingConfig(CachedConfig):
    """Keys of every option that reads token shards."""

    packing: str = key(
        "concat",
        "concat: one stream of tokens, split every seq_len; bestfit: documents are cut only where they are longer than seq_len,"
        " and the pieces fill samples by best-fit decreasing (arXiv 2404.10830), padded at the end",
    )


@dataclass(frozen=True)
class CorpusConfig(TokenizedConfig, PackingConfig):
    """Keys of every option that starts from documents."""

    validation: float = key(0.01, "share of the tokens that is held out, in whole documents where that comes near it")
    fim_rate: float = key(0.0, "share of the documents that are cut for fill-in-the-middle (arXiv 2207.14255)")
    fim_spm_rate: float = key(0.5, "share of these that are written suffix first")


@dataclass(frozen=True)
class StdlibConfig(CorpusConfig):
    """The source of the running interpreter's standard library."""

    _target_: str = target("meshloom.data.nodes.Stdlib")
    name: str = option("stdlib")
    part: str = key("source", "source: the modules themselves; docs: their docstrings, which are prose")


@dataclass(frozen=True)
class TextConfig(CorpusConfig):
    """Files of UTF-8 text, plain or compressed by gzip, bzip2, xz or zstd."""

    _target_: str = target("meshloom.data.nodes.Text")
    name: str = option("text")
    input: Any = key(None, INPUT, Side.PLACEMENT)
    separator: str | None = key(None, "text that separates documents within a file; null: a file is a document")
    markup: bool = key(False, "files of JSON, HTML, XML or CSV are meant as text, with their markup")


@dataclass(frozen=True)
class RecordConfig(CorpusConfig):
    """Keys of every option whose documents are in records."""

    field: str = key("text", "the member or column that holds the text")
    prompt: str | None = key(None, "the member with a text that stands before that of field, and carries no loss; null: none")
    messages: str | None = key(
        None,
        "the member with a conversation, written by the chat template: only what the assistant says carries loss",
    )
    chat_template: str | None = key(None, "file of the Jinja template for messages; null: the one beside the tokenizer")


@dataclass(frozen=True)
class JsonlConfig(RecordConfig):
    """Files of JSON objects, one a line or not, or of arrays of objects; plain or compressed as those of text."""

    _target_: str = target("meshloom.data.nodes.Jsonl")
    name: str = option("jsonl")
    input: Any = key(None, INPUT, Side.PLACEMENT)


@dataclass(frozen=True)
class ParquetConfig(RecordConfig):
    """Parquet files."""

    _target_: str = target("meshloom.data.nodes.Parquet")
    name: str = option("parquet")
    input: Any = key(None, INPUT, Side.PLACEMENT)


@dataclass(frozen=True)
class HfConfig(RecordConfig):
    """A data set of the Hugging Face `datasets` library."""

    _target_: str = target("meshloom.data.nodes.Hf")
    name: str = option("hf")
    path: str | None = key(None, "name of the data set on the hub, or a folder", Side.PLACEMENT)
    subset: str | None = key(None, "the data set's configuration, where it has several")
    split: str = key("train", "which part of the data set")
    revision: str | None = key(None, "commit or tag: pin it, for it is all that tells one state of the data set from another")


@dataclass(frozen=True)
class ShardsConfig(PackingConfig):
    """Token shards made by `meshloom data tokenize`."""

    _target_: str = target("meshloom.data.nodes.Tokenized")
    name: str = option("shards")
    path: str | None = key(
        None,
        "output of `meshloom data tokenize`, or a single shard folder, which then is training data; a path, or an fsspec URL"
        " (`s3://…`), whose shards are copied into the cache",
        Side.PLACEMENT,
    )
    validation: str | None = key(None, "another folder of validation shards; null: the one in `path`, if any", Side.PLACEMENT)


@dataclass(frozen=True)
class DataMixtureConfig(TokenizedConfig, CachedConfig):
    """Several sources by weight, with one tokenizer. Keys that sources have too apply to all of them."""

    _target_: str = target("meshloom.data.mixture.Mixture")
    _recursive_: bool = key(False, "Hydra's: the mixture builds its sources itself")
    name: str = option("mixture")
    sources: dict[str, Any] = key(
        {}, "name → node of any other option of this group (`/data@sources.code: stdlib` in a recipe's defaults)"
    )
    weights: dict[str, Any] = key({}, "name → share of the samples, in any unit")
    block: int = key(1000, "samples over which the shares are exact")

    @property
    def shared(self) -> dict[str, Any]:
        """The keys that the mixture sets for all its sources that have them."""
        own = {field.name for kind in (TokenizedConfig, CachedConfig) for field in fields(kind)} - {"_target_", "name"}
        return {name: value for name, value in vars(self).items() if name in own}

    def __post_init__(self) -> None:
        # `object` assigns where the dataclass is frozen, too.
        object.__setattr__(self, "sources", _nested(self.sources))
        object.__setattr__(self, "weights", _nested(self.weights))

    @property
    def nested(self) -> Mapping[str, Any]:
        """The sources by name."""
        return self.named_sources

    @property
    def named_sources(self) -> dict[str, Any]:
        """Name of each source → its node. A name may have dots: `c4.en` is a node in a node, as Hydra composes it."""
        return dict(_flat(self.sources, is_leaf=lambda node: "_target_" in node or not all(map(_is_node, node.values()))))

    @property
    def named_weights(self) -> dict[str, Any]:
        """Name of each source → its weight."""
        return dict(_flat(self.weights, is_leaf=lambda node: False))


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping)


def _nested(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree in which each dot of a name is a level, as in Hydra's keys."""
    found: dict[str, Any] = {}
    for name in sorted(tree, key=lambda name: "." not in name):  # what is typed comes as levels, and has the last word
        *levels, last = name.split(".")
        node = found
        for level in levels:
            node = node.setdefault(level, {})
        node[last] = _joined(node.get(last), tree[name])
    return {name: found[name] for name in dict.fromkeys(name.split(".")[0] for name in tree)}


def _joined(below: Any, above: Any) -> Any:
    """Merge two nodes. `above` has the last word, but where it only has its option's default."""
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    one, other = cast(dict[str, Any], below), cast(dict[str, Any], above)
    option = find_option(OPTIONS, other.get("_target_"))
    defaults = {field.name: field.default for field in fields(option)} if option is not None else {}
    untouched = {name for name in one if name in defaults and other.get(name) == defaults[name]}
    return {
        name: one[name] if name not in other or name in untouched else _joined(one.get(name), other[name])
        for name in {**one, **other}
    }


def _flat(tree: Mapping[str, Any], is_leaf: Callable[[Mapping[str, Any]], bool], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, node in tree.items():
        if isinstance(node, Mapping) and node and not is_leaf(cast(Mapping[str, Any], node)):
            yield from _flat(cast(Mapping[str, Any], node), is_leaf, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", node


@dataclass(frozen=True)
class SyntheticConfig(DataConfig):
    """Seeded random tokens, for benchmarks and dry runs."""

    _target_: str = target("meshloom.data.synthetic.Synthetic")
    name: str = option("synthetic")
    vocabulary: int | None = key(None, "tokens lie in [0, vocabulary); null: the model's")
    validation_samples: int = key(64, "size of the validation set; 0: none")

    @property
    def known_vocabulary(self) -> int | None:
        """The vocabulary's size, where it is not the model's."""
        return self.vocabulary


OPTIONS: tuple[type, ...] = (
    StdlibConfig,
    TextConfig,
    JsonlConfig,
    ParquetConfig,
    HfConfig,
    ShardsConfig,
    DataMixtureConfig,
    SyntheticConfig,
)
"""Schemas of the group, known to Hydra as data/base_<name>; `recipes/data/<name>.yaml` extends them."""
