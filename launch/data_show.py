"""`meshloom data show`: samples of a run as the model sees them.

meshloom data show recipe=quickstart --sample 17
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..config.problems import ConfigError, Problem
from ..config.words import counted
from .run_data import RunData, prepared_run, run_view, view_parser, whole_number

if TYPE_CHECKING:
    from ..data.batch import Sample
    from ..trainer.resolve import ResolvedRun

TRAIN, HELD_OUT = "train", "validation"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_COLOURS = ("\x1b[36m", "\x1b[33m")  # of documents by turns
_OPEN, _CLOSE = "⟦", "⟧"


def main(words: Sequence[str]) -> int:
    """Show samples. Return the exit code."""
    parser = view_parser("meshloom data show", __doc__ or "")
    parser.add_argument(
        "--sample",
        type=whole_number,
        default=None,
        metavar="K",
        help="number of the first, from 0 (default: of the data)",
    )
    parser.add_argument("--count", type=whole_number, default=1, metavar="N", help="how many (default 1)")
    parser.add_argument(
        "--set", default=TRAIN, help="train, validation, or the name of a source or set that is evaluated apart"
    )
    parser.add_argument("--ids", action="store_true", help="show token ids, too")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each sample")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default auto: on a terminal")
    return run_view(parser, words, _show)


def _show(asked: argparse.Namespace, run: ResolvedRun) -> None:
    data = prepared_run(run)
    color = asked.color == "always" or (asked.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    default = data.first_sample if asked.set == TRAIN else 0
    first = default if asked.sample is None else asked.sample
    for number in range(first, first + asked.count):
        sample = _sample(data, asked.set, number)
        if asked.json:
            print(json.dumps(sample_as_json(sample, data, number), ensure_ascii=False))
        else:
            print("\n".join(sample_lines(sample, data, f"sample {number} of {asked.set}", color=color, ids=asked.ids)))


def _sample(data: RunData, name: str, number: int) -> Sample:
    """Return a sample of the training or validation data. Raises ConfigError where there is none."""
    if name == TRAIN:
        data.refuse_other_stages(number)
        return data.train()[number]
    from ..data.validation import validation_parts
    from ..data.validation_sets import ValidationSets

    config = data.run.config
    parts = [*validation_parts(data.node), *ValidationSets(config.validation, config.data, config.seed).parts(data.node)]
    held = {part.name or HELD_OUT: part.samples for part in parts}
    if name not in held:
        known = ", ".join([TRAIN, *held])
        raise ConfigError([Problem("--set", f"the run has no samples '{name}'", f"use one of {known}")])
    if number >= len(held[name]):
        raise ConfigError([Problem("--sample", f"'{name}' has {counted(len(held[name]), 'sample')}", "count from 0")])
    return held[name][number]


def sample_lines(sample: Sample, data: RunData, title: str, *, color: bool, ids: bool) -> Iterator[str]:
    """Yield a sample's lines: a head, then its documents. What carries no loss is dim, or without colours in ⟦…⟧."""
    from ..data.samples.sample_text import learned_positions, padding_of, sample_spans

    tokenizer = data.node.tokenizer
    padding = padding_of(sample, None if tokenizer is None else tokenizer.end_of_document)
    spans, size = sample_spans(sample, tokenizer), len(sample.tokens)
    documents = len({span.document for span in spans})
    crossed = "attention crosses documents" if sample.documents is None else counted(documents, "document")
    learned = int(learned_positions(sample).sum())
    yield f"{title} ({data.title}): {counted(size, 'position')}, {crossed}, {learned:,} carry loss, {padding:,} are padding"
    last = -1
    for span in spans:
        if span.document != last:
            length = sum(each.stop - each.start for each in spans if each.document == span.document)
            yield f"── document {span.document + 1}, {counted(length, 'token')}" + (
                " ──" if sample.documents is not None else ""
            )
            last = span.document
        text = span.text if not ids else f"{span.text}  {sample.tokens[span.start : span.stop].tolist()}"
        if color:
            yield f"{_COLOURS[span.document % 2] if span.learned else _DIM}{text}{_PLAIN}"
        else:
            yield text if span.learned else f"{_OPEN}{text}{_CLOSE}"
    if padding:
        yield f"── {counted(padding, 'position')} of padding ──"


def sample_as_json(sample: Sample, data: RunData, number: int) -> dict[str, Any]:
    """Return a sample as plain values: its spans, and the tokens and targets of every position."""
    from ..data.samples.sample_text import padding_of, sample_spans

    tokenizer = data.node.tokenizer
    return {
        "sample": number,
        "padding": padding_of(sample, None if tokenizer is None else tokenizer.end_of_document),
        "spans": [vars(span) for span in sample_spans(sample, tokenizer)],
        "tokens": sample.tokens.tolist(),
        "targets": sample.targets.tolist(),
        "documents": None if sample.documents is None else sample.documents.tolist(),
    }
