"""Config of `data`: where tokens come from and how they become samples. One dataclass per option of the group.

Where data lie (paths, caches) is placement. Their fingerprint tells what they are; a resumed run compares it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..config.keys import MISSING, Side, key, option, target
from ..config.nodes import Custom
from ..config.problems import Problem

SEQ_LEN = "positions per sample"
DOCUMENT_MASK = "attention stays inside documents"
VERIFY = "read all shards at the start and compare digests (sizes are compared in any case)"
CACHE_DIR = "where what is built is kept; null: $MESHLOOM_CACHE, else ~/.cache/meshloom"
TOKENIZER = "bpe: byte-level BPE trained on this corpus; bytes: a token per byte; or the path of a tokenizer.json"
VOCABULARY = "size of the trained BPE vocabulary"
TOKENIZER_SAMPLE = "characters of the corpus the tokenizer is trained on, at most"
END_OF_DOCUMENT = "the token that ends a document in a tokenizer.json; null: the well-known names are tried"
INPUT = "a path, glob pattern or folder, or a list of them"


@dataclass
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
        return getattr(self, "vocabulary", None)

    @property
    def cache(self) -> str | None:
        """`cache_dir`, of options that have it."""
        return getattr(self, "cache_dir", None)


class CustomData(DataConfig, Custom):
    """Data of the user's own."""


@dataclass
class PackingConfig(DataConfig):
    """Keys of every option that reads token shards."""

    packing: str = key(
        "concat",
        "concat: one stream of tokens, split every seq_len; bestfit: documents are cut only where they are longer than seq_len,"
        " and the pieces fill samples by best-fit decreasing (arXiv 2404.10830), padded at the end",
    )
    document_mask: bool = key(False, DOCUMENT_MASK)
    verify: bool = key(False, VERIFY, Side.HABIT)
    cache_dir: str | None = key(None, CACHE_DIR, Side.PLACEMENT)


@dataclass
class CorpusConfig(PackingConfig):
    """Keys of every option that starts from documents."""

    tokenizer: str = key("bpe", TOKENIZER)
    vocabulary: int = key(4096, VOCABULARY)
    tokenizer_sample: int = key(100_000_000, TOKENIZER_SAMPLE)
    end_of_document: str | None = key(None, END_OF_DOCUMENT)
    validation: float = key(0.01, "fraction of the documents held out")


@dataclass
class StdlibConfig(CorpusConfig):
    """The source of the running interpreter's standard library."""

    _target_: str = target("meshloom.data.nodes.Stdlib")
    name: str = option("stdlib")


@dataclass
class TextConfig(CorpusConfig):
    """Files of UTF-8 text."""

    _target_: str = target("meshloom.data.nodes.Text")
    name: str = option("text")
    input: Any = key(None, INPUT, Side.PLACEMENT)
    separator: str | None = key(None, "text that separates documents within a file; null: a file is a document")


@dataclass
class JsonlConfig(CorpusConfig):
    """Files with a JSON object per line, plain, .gz or .zst."""

    _target_: str = target("meshloom.data.nodes.Jsonl")
    name: str = option("jsonl")
    input: Any = key(None, INPUT, Side.PLACEMENT)
    field: str = key("text", "the member or column that holds the text")


@dataclass
class ParquetConfig(CorpusConfig):
    """Parquet files."""

    _target_: str = target("meshloom.data.nodes.Parquet")
    name: str = option("parquet")
    input: Any = key(None, INPUT, Side.PLACEMENT)
    field: str = key("text", "the member or column that holds the text")


@dataclass
class HfConfig(CorpusConfig):
    """A data set of the Hugging Face `datasets` library."""

    _target_: str = target("meshloom.data.nodes.Hf")
    name: str = option("hf")
    path: str | None = key(None, "name of the data set on the hub, or a folder", Side.PLACEMENT)
    subset: str | None = key(None, "the data set's configuration, where it has several")
    split: str = key("train", "which part of the data set")
    field: str = key("text", "the member or column that holds the text")
    revision: str | None = key(None, "commit or tag: pin it, for it is all that tells one state of the data set from another")


@dataclass
class ShardsConfig(PackingConfig):
    """Token shards made by `meshloom data tokenize`."""

    _target_: str = target("meshloom.data.nodes.Tokenized")
    name: str = option("shards")
    path: str | None = key(
        None, "output of `meshloom data tokenize`, or a single shard folder, which then is training data", Side.PLACEMENT
    )
    validation: str | None = key(None, "another folder of validation shards; null: the one in `path`, if any", Side.PLACEMENT)


@dataclass
class MixtureConfig(DataConfig):
    """Several sources by weight, with one tokenizer. Keys that sources have too apply to all of them."""

    _target_: str = target("meshloom.data.mixture.Mixture")
    _recursive_: bool = key(False, "Hydra's: the mixture builds its sources itself")
    name: str = option("mixture")
    sources: dict[str, Any] = key(
        {}, "name → node of any other option of this group (`/data@sources.code: stdlib` in a recipe's defaults)"
    )
    weights: dict[str, float] = key({}, "name → share of the samples, in any unit")
    block: int = key(1000, "samples over which the shares are exact")
    document_mask: bool = key(False, DOCUMENT_MASK)
    verify: bool = key(False, VERIFY, Side.HABIT)
    cache_dir: str | None = key(None, CACHE_DIR, Side.PLACEMENT)
    tokenizer: str = key("bpe", TOKENIZER)
    vocabulary: int = key(4096, VOCABULARY)
    tokenizer_sample: int = key(100_000_000, TOKENIZER_SAMPLE)
    end_of_document: str | None = key(None, END_OF_DOCUMENT)


@dataclass
class SyntheticConfig(DataConfig):
    """Seeded random tokens, for benchmarks and dry runs."""

    _target_: str = target("meshloom.data.synthetic.Synthetic")
    name: str = option("synthetic")
    vocabulary: int | None = key(None, "tokens lie in [0, vocabulary); null: the model's")
    validation_samples: int = key(64, "size of the validation set; 0: none")


OPTIONS: tuple[type, ...] = (
    StdlibConfig,
    TextConfig,
    JsonlConfig,
    ParquetConfig,
    HfConfig,
    ShardsConfig,
    MixtureConfig,
    SyntheticConfig,
)
"""Schemas of the group, known to Hydra as data/base_<name>; `recipes/data/<name>.yaml` extends them."""
