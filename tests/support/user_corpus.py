"""Data of a user's own class, which makes its config itself and so does not hand on the version of the rules."""

from __future__ import annotations

from meshloom.data.config import CorpusConfig
from meshloom.data.corpus import Corpus
from meshloom.data.documents.sources import TextFiles
from meshloom.data.version import NEWEST


class UserCorpus(Corpus):
    """Text files, a document each line. `rules` stands for the newest version of the Meshloom that is installed."""

    rules = NEWEST

    def __init__(self, seed: int, file: str, seq_len: int, cache: str) -> None:
        config = CorpusConfig(tokenizer="bytes", seq_len=seq_len, validation=0, cache_dir=cache, version=self.rules)
        super().__init__(config, seed, TextFiles(file, separator="\n"))
