"""`meshloom data stats`: how much a run's data hold, how long its documents are, and how often it reads them.

meshloom data stats recipe=quickstart
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .run_data import RunData, prepared_run, run_view, view_parser, whole_number
from .table import aligned

if TYPE_CHECKING:
    from ..trainer.resolve import ResolvedRun

_BAR = 32  # characters of the longest bar


def main(words: Sequence[str]) -> int:
    """Tell what the data hold. Return the exit code."""
    parser = view_parser("meshloom data stats", __doc__ or "")
    parser.add_argument(
        "--samples", type=whole_number, default=256, metavar="N", help="samples of the run that are read (default 256)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object for each stage")
    return run_view(parser, words, _print)


def _print(asked: argparse.Namespace, run: ResolvedRun) -> None:
    for each in (run, *run.then):
        found = data_statistics(prepared_run(each), asked.samples)
        print(json.dumps(found) if asked.json else "\n".join(statistics_lines(found)))


@dataclass(frozen=True)
class Read:
    """Contents of a run's samples, from number `first` on. documents, learned, padding: means of a sample.

    after_others  whether other stages come before, so that the run may begin elsewhere in the data
    """

    samples: int
    first: int
    after_others: bool
    documents: float
    learned: float
    padding: float
    bytes_per_token: float | None


def data_statistics(data: RunData, samples: int) -> dict[str, Any]:
    """Return the numbers of a run's data, as plain values. samples: how many of their first ones are read."""
    from ..data.documents.lengths import describe_lengths, length_histogram
    from ..data.summary import packed_sources, source_sizes

    config, planned = data.run.config, planned_samples(data.run)
    nodes = {name: node for name, _, node in packed_sources(data.node)}
    sources: dict[str, Any] = {}
    for size in source_sizes(data.node):
        source = asdict(size)
        source["epochs"] = None if planned is None else size.weight * planned / size.samples
        lengths = nodes[size.name].shards.document_lengths()
        source["lengths"] = describe_lengths(lengths)
        source["histogram"] = [asdict(each) for each in length_histogram(lengths)]
        source["longer"] = int((lengths > config.data.seq_len).sum())
        sources[size.name or "data"] = source
    return {
        "data": data.title,
        "seq_len": config.data.seq_len,
        "samples": planned,
        "tokens": None if planned is None else planned * config.data.seq_len,
        "sources": sources,
        "read": asdict(read_samples(data, samples)),
    }


def planned_samples(run: ResolvedRun) -> int | None:
    """Return the samples that a run, or a stage, reads; None where the batch decides it on the way."""
    from ..trainer.derived import run_length

    config, place = run.config, run.place
    if place is not None:
        return -(-(place.stage.end - place.stage.begin) // config.data.seq_len)
    length = run_length(config.trainer)
    if length.unit.value == "tokens":
        return -(-int(length.value) // config.data.seq_len)
    return int(length.value) * config.batch.start if config.batch.name == "fixed" else None


def read_samples(data: RunData, count: int) -> Read:
    """Read the first samples of a run's data, and count what they consist of."""
    from ..data.batch import document_lengths
    from ..data.samples.sample_text import learned_positions, padding_of

    samples, tokenizer = data.train(), data.node.tokenizer
    end = None if tokenizer is None else tokenizer.end_of_document
    sizes = None if tokenizer is None else tokenizer.byte_lengths()
    documents = learned = padding = text = used = 0
    for number in range(data.first_sample, data.first_sample + count):
        sample = samples[number]
        empty = padding_of(sample, end)
        documents += len(document_lengths(samples, number))
        learned += int(learned_positions(sample).sum())
        padding += empty
        used += len(sample.tokens) - empty
        text += 0 if sizes is None else int(sizes[sample.tokens[: len(sample.tokens) - empty]].sum())
    positions = max(1, count * samples.seq_len)
    per_token = text / used if sizes is not None and used else None
    place = data.run.place
    after_others = place is not None and place.record is None
    shares = (documents / max(1, count), learned / positions, padding / positions)
    return Read(count, data.first_sample, after_others, *shares, per_token)


def statistics_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the numbers for a terminal: a table of sources, what samples consist of, a histogram of each source."""
    length = (
        "as long as the batch decides"
        if found["samples"] is None
        else f"{found['samples']:,} samples, {found['tokens']:,} tokens"
    )
    yield f"{found['data']}: samples of {found['seq_len']:,} tokens; the run reads {length}"
    rows = [["source", "weight", "tokens", "documents", "samples", "padding", "held-out tokens", "epochs"]]
    for name, size in found["sources"].items():
        epochs = "?" if size["epochs"] is None else f"{size['epochs']:.2f}"
        counts = [f"{size[key]:,}" for key in ("tokens", "documents", "samples")]
        rows.append([name, f"{size['weight']:.3g}", *counts, f"{size['padding']:.1%}", f"{size['held_tokens']:,}", epochs])
    if len(rows) > 1:
        yield from aligned(rows)
    read = found["read"]
    text = "" if read["bytes_per_token"] is None else f", {read['bytes_per_token']:.2f} bytes a token"
    samples = f"{read['samples']:,} samples"
    which = f"{samples} from number {read['first']:,} on" if read["first"] else f"first {samples}"
    which += ", as if no stage had read of them" if read["after_others"] else ""
    yield (
        f"of the {which}: {read['documents']:.1f} documents a sample, {read['learned']:.1%} of"
        f" positions carry loss, {read['padding']:.1%} are padding{text}"
    )
    for name, size in found["sources"].items():
        yield f"{name}: {size['lengths']}; {size['longer']:,} are longer than a sample"
        yield from histogram_lines(size["histogram"])


def histogram_lines(classes: Sequence[Mapping[str, int]]) -> Iterator[str]:
    """Yield a line for each class of lengths: documents, their tokens, and a bar of the tokens."""
    most = max((each["tokens"] for each in classes), default=0)
    width = max((len(f"{each['longest']:,}") for each in classes), default=0)
    for each in classes:
        bar = "█" * round(_BAR * each["tokens"] / most) if most else ""
        documents = f"{each['documents']:>10,} {'document ' if each['documents'] == 1 else 'documents'}"
        yield f"  up to {each['longest']:>{width},}  {documents}  {each['tokens']:>15,} tokens  {bar}".rstrip()
