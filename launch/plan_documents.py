"""The documents that a plan counts on: of a given length, or the run's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..config.problems import ConfigError, Problem
from ..trainer.schema import RunConfig

Documents = float | Literal["data"] | None
"""Documents as a command line gives them: mean tokens, or those of the run's first step. None: a sample is one."""


def read_documents(text: str) -> float | Literal["data"]:
    """Read the option's value. Raises ValueError for what is neither `data` nor a number."""
    return "data" if text == "data" else float(text)


def step_documents(config: RunConfig, documents: Documents) -> list[int]:
    """List the lengths of a step's documents: the run's own, for which its data are prepared, or all of one length.

    Raises ConfigError for data that can't be read, and where the samples of the step are not known.
    """
    samples, seq_len = config.batch.samples, config.data.seq_len
    if not isinstance(samples, int):
        text = "the samples of the first step are not known before the run"
        raise ConfigError([Problem("batch.samples", text, "give a number as batch.samples=…, or leave --documents out")])
    if documents == "data":
        from ..data.batch import GlobalBatch
        from ..parallel.hybrid.share import BatchDocuments
        from ..trainer.run import prepared_data

        data = prepared_data(config.data, config.seed, config.model.vocabulary)
        return BatchDocuments.of(data.train(), GlobalBatch(0, samples)).lengths
    length = seq_len if documents is None else max(1, min(seq_len, round(documents)))
    return ([length] * (seq_len // length) + [seq_len % length] * (seq_len % length > 0)) * samples


def mean_length(lengths: Sequence[int]) -> float:
    """Return the mean length of the document that a token is in: attention costs as much as with documents of that length."""
    return sum(length * length for length in lengths) / sum(lengths)
