"""Config of `data`: where tokens come from and how they become samples. One dataclass per option of the group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


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

    _target_: str = "meshloom.data.corpus.Stdlib"
    name: str = "stdlib"


@dataclass
class TextConfig(CorpusConfig):
    """Files of UTF-8 text.

    input      a path, glob pattern or folder, or a list of them
    separator  text that separates documents within a file; null: a file is a document
    """

    _target_: str = "meshloom.data.corpus.Text"
    name: str = "text"
    input: Any = MISSING
    separator: str | None = None


@dataclass
class SyntheticConfig:
    """Seeded random tokens, for benchmarks and dry runs.

    vocabulary          tokens lie in [0, vocabulary); the recipe sets it to the model's
    validation_samples  size of the validation set
    """

    _target_: str = "meshloom.data.synthetic.Synthetic"
    name: str = "synthetic"
    seq_len: int = 1024
    vocabulary: int = 32_000
    validation_samples: int = 64


def register(store: Any) -> None:
    """Put the typed bases into Hydra's ConfigStore; `recipes/data/<name>.yaml` extends `base_<name>`."""
    for node in (StdlibConfig, TextConfig, SyntheticConfig):
        store.store(group="data", name=f"base_{node.name}", node=node)
