"""Config of `data`: where tokens come from and how they become samples. One dataclass per option of the group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass
class PackingConfig:
    """Keys of every option that reads token shards.

    seq_len        positions per sample
    packing        concat: one stream of tokens, split every seq_len; bestfit: documents are cut only where they are longer
                   than seq_len, and the pieces fill samples by best-fit decreasing (arXiv 2404.10830), padded at the end
    document_mask  attention stays inside documents
    verify         read all shards at the start and compare digests (sizes are compared in any case)
    cache_dir      where what is built is kept; null: $MESHLOOM_CACHE, else ~/.cache/meshloom
    """

    seq_len: int = 1024
    packing: str = "concat"
    document_mask: bool = False
    verify: bool = False
    cache_dir: str | None = None


@dataclass
class CorpusConfig(PackingConfig):
    """Keys of every option that starts from documents.

    tokenizer         bpe: byte-level BPE trained on this corpus; bytes: a token per byte; or the path of a tokenizer.json
    vocabulary        size of the trained BPE vocabulary
    tokenizer_sample  characters of the corpus it is trained on, at most
    end_of_document   the token that ends a document in a tokenizer.json; null: the well-known names are tried
    validation        fraction of the documents held out
    """

    tokenizer: str = "bpe"
    vocabulary: int = 4096
    tokenizer_sample: int = 100_000_000
    end_of_document: str | None = None
    validation: float = 0.01


@dataclass
class StdlibConfig(CorpusConfig):
    """The source of the running interpreter's standard library."""

    _target_: str = "meshloom.data.nodes.Stdlib"
    name: str = "stdlib"


@dataclass
class TextConfig(CorpusConfig):
    """Files of UTF-8 text.

    input      a path, glob pattern or folder, or a list of them
    separator  text that separates documents within a file; null: a file is a document
    """

    _target_: str = "meshloom.data.nodes.Text"
    name: str = "text"
    input: Any = None
    separator: str | None = None


@dataclass
class JsonlConfig(CorpusConfig):
    """Files with a JSON object per line, plain, .gz or .zst.

    input  a path, glob pattern or folder, or a list of them
    field  the member that holds the text
    """

    _target_: str = "meshloom.data.nodes.Jsonl"
    name: str = "jsonl"
    input: Any = None
    field: str = "text"


@dataclass
class ParquetConfig(CorpusConfig):
    """Parquet files.

    input  a path, glob pattern or folder, or a list of them
    field  the column that holds the text
    """

    _target_: str = "meshloom.data.nodes.Parquet"
    name: str = "parquet"
    input: Any = None
    field: str = "text"


@dataclass
class HfConfig(CorpusConfig):
    """A data set of the Hugging Face `datasets` library.

    path      name on the hub, or a folder
    subset    its configuration, where it has several
    split     which part of it
    field     the column that holds the text
    revision  commit or tag: pin it, for it is all that tells one state of the data set from another
    """

    _target_: str = "meshloom.data.nodes.Hf"
    name: str = "hf"
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    revision: str | None = None


@dataclass
class ShardsConfig(PackingConfig):
    """Token shards made by `meshloom data tokenize`.

    path        its output, or a single shard folder, which then is training data
    validation  another folder of validation shards; null: the one in `path`, if any
    """

    _target_: str = "meshloom.data.nodes.Shards"
    name: str = "shards"
    path: str | None = None
    validation: str | None = None


@dataclass
class MixtureConfig:
    """Several sources by weight, with one tokenizer.

    sources  name → node of any other option of this group (`/data@sources.code: stdlib` in a recipe's defaults)
    weights  name → share of the samples, in any unit
    block    samples over which the shares are exact

    The other keys are as in CorpusConfig and hold for all sources, which leave them alone.
    """

    _target_: str = "meshloom.data.mixture.Mixture"
    _recursive_: bool = False
    name: str = "mixture"
    sources: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    block: int = 1000
    seq_len: int = 1024
    document_mask: bool = False
    verify: bool = False
    cache_dir: str | None = None
    tokenizer: str = "bpe"
    vocabulary: int = 4096
    tokenizer_sample: int = 100_000_000
    end_of_document: str | None = None


@dataclass
class SyntheticConfig:
    """Seeded random tokens, for benchmarks and dry runs.

    vocabulary          tokens lie in [0, vocabulary); null: the model's
    validation_samples  size of the validation set
    """

    _target_: str = "meshloom.data.synthetic.Synthetic"
    name: str = "synthetic"
    seq_len: int = 1024
    vocabulary: int | None = None
    validation_samples: int = 64


def register(store: ConfigStore) -> None:
    """Put the typed bases into Hydra's ConfigStore; `recipes/data/<name>.yaml` extends `base_<name>`."""
    for node in (
        StdlibConfig,
        TextConfig,
        JsonlConfig,
        ParquetConfig,
        HfConfig,
        ShardsConfig,
        MixtureConfig,
        SyntheticConfig,
    ):
        store.store(group="data", name=f"base_{node.name}", node=node)
