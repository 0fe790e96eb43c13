"""Evaluate a checkpoint's model on validation data, by the same path as a run evaluates itself, on any layout."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..checkpoint.restore import read_state
from ..config.lazy import numpy as np
from ..config.per_host import is_first_on_host, share_on_host
from ..config.problems import ConfigError, Problem
from ..config.progress_bar import progress
from ..data.assignment import Dealer, Share
from ..data.batch import IGNORED, GlobalBatch
from ..data.tokenizing.tokenizer import Tokenizer
from ..data.validation import ValidationPart, samples_of_parts, validation_parts
from ..data.validation_sets import ValidationSets
from ..parallel.engine import Engine, StepLoss
from ..parallel.engines import make_engine, start_compiling
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh, pick_device
from .build import (
    build_dealer,
    build_model,
    engine_settings,
    optimizer_factory,
)
from .hooks.evaluation import counted_weights, weighted_mean
from .resolve import ResolvedRun
from .resume import refuse_another_tokenizer, restore_weights
from .resumed_config import KeptNotice
from .run import prepared_data
from .schema import RunConfig
from .validation_samples import evaluation_dealer, validation_share

log = logging.getLogger(__name__)

AT_ONCE = 64
"""Micro-batches of each data rank that are in memory at a time: as many as make what is done once for all of them cheap."""


@dataclass(frozen=True)
class SourceLoss:
    """Loss on the validation samples of one source or named set.

    name     "data" where the data are one source
    weight   of the source in the mean; 0 for a named set
    samples  that were evaluated
    tokens   positions that carry loss
    loss     mean over these, in nats
    bytes    of UTF-8 text that these stand for; None where tokens have no text
    """

    name: str
    weight: float
    samples: int
    tokens: int
    loss: float
    bytes: int | None

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of text: the loss of all tokens, ends of documents included, over the bytes."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def as_json(self) -> dict[str, Any]:
        """Return its numbers; None where there is nothing that a number could say."""
        told = self.loss if self.tokens else None
        return {
            "loss": told,
            "perplexity": perplexity(told),
            "bits_per_byte": self.bits_per_byte,
            "samples": self.samples,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "weight": self.weight,
        }


@dataclass(frozen=True)
class EvaluationResult:
    """Losses of a checkpoint's model.

    loss      the mean of the sources by weight, as `eval_loss` of a run; None where no source has a target
    same_data  whether the data is what the checkpoint's run was trained on; None for an import, which does not say
    """

    checkpoint: str
    step: int
    layout: str
    precision: str
    loss: float | None
    bits_per_byte: float | None
    sources: tuple[SourceLoss, ...]
    same_data: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values, the sources by name."""
        return {
            "checkpoint": self.checkpoint,
            "step": self.step,
            "layout": self.layout,
            "precision": self.precision,
            "loss": self.loss,
            "perplexity": perplexity(self.loss),
            "bits_per_byte": self.bits_per_byte,
            "same_data": self.same_data,
            "sources": {each.name: each.as_json() for each in self.sources},
        }


def perplexity(loss: float | None) -> float | None:
    """Return e to the loss; None for no loss, and for one so large that the result is no number."""
    return None if loss is None or not loss < 700 else math.exp(loss)


def evaluate(resolved: ResolvedRun, *, whole: bool = False) -> EvaluationResult:
    """Evaluate the model of `resolved.checkpoint`, as one of the run's processes. The same on every rank.

    whole: all validation samples; otherwise the first `trainer.eval_samples`, as a run does

    Raises ConfigError for data without validation samples, or cut by another tokenizer than the model's, and
    CheckpointError for a damaged checkpoint.
    """
    resolved.refuse()
    for notice in resolved.notices:
        if not isinstance(notice, KeptNotice):  # as is to be expected of an evaluation
            log.info("%s", notice)
    config, checkpoint = resolved.config, resolved.checkpoint
    assert checkpoint is not None, "the command names one"
    data = prepared_data(config.data, config.seed, config.model.vocabulary)
    state = share_on_host("checkpoint", lambda: read_state(checkpoint))
    refuse_another_tokenizer(state, data, checkpoint)
    trained_on = state.get("data_fingerprint")
    same_data = None if trained_on is None else trained_on == data.fingerprint
    if same_data is False:
        log.info("the data is not what the checkpoint's run was trained on: its files, or keys of data, are others")
    parts = [*validation_parts(data), *ValidationSets(config.validation, config.data, config.seed).parts(data)]
    if not parts:
        fix = "hold some out (data.validation=0.01), or name sets: see docs/evaluate.md"
        raise ConfigError([Problem("data", "it keeps nothing for validation, and there are no named sets", fix)])
    model = build_model(config.model, config.model.vocabulary or data.vocabulary)
    settings = engine_settings(config, model, data.seq_len)
    if is_first_on_host():
        start_compiling(model, config.parallel, settings)
    mesh = Mesh.connect(Layout.plan(config.parallel, resolved.world_size), pick_device(), config.parallel.timeout)
    try:
        if mesh.differ(f"{checkpoint} {data.fingerprint}"):
            raise RuntimeError("processes see different checkpoints or data: give all of them the same files")
        dealer = evaluation_dealer(config, mesh.layout, build_dealer(config, mesh.layout, model))
        engine = make_engine(model, mesh, optimizer_factory(config.optim), config.parallel, settings)
        report = restore_weights(engine, mesh, checkpoint)
        counts = [len(part.samples) for part in parts] if whole else samples_of_parts(parts, config.trainer.eval_samples)
        token_bytes = None if data.tokenizer is None else token_sizes(data.tokenizer, data.vocabulary)
        found, sizes = _evaluate_parts(config, mesh, engine, dealer, parts, counts, token_bytes)
        engine.finish()
        names = source_names(parts)
        sources = [
            SourceLoss(name, part.weight, samples, round(float(loss.tokens)), float(loss.mean), size)
            for name, part, samples, loss, size in zip(names, parts, counts, found, sizes, strict=True)
        ]
        result = _result(
            config, str(checkpoint), report.step, mesh, sources, counted_weights([part.weight for part in parts]), found
        )
        return replace(result, same_data=same_data)
    finally:
        mesh.close()


def _evaluate_parts(
    config: RunConfig,
    mesh: Mesh,
    engine: Engine,
    dealer: Dealer,
    parts: Sequence[ValidationPart],
    counts: Sequence[int],
    token_bytes: np.ndarray | None,
) -> tuple[list[StepLoss], list[int] | list[None]]:
    """Compute the loss on the first samples of each part, and count the bytes of their targets. A collective.

    Few samples are in memory at a time, and each is read once. Rank 0 shows a bar.

    token_bytes: (V,) of each token; None: they have no text, and the counts are None
    """
    found: list[StepLoss] = []
    mine = torch.zeros(len(parts), dtype=torch.float64)
    samples, unit = sum(counts), config.batch.micro_size * mesh.layout.data_size
    quiet = not (mesh.is_main and config.logging.progress)
    with progress(f"evaluating {samples:,} samples", quiet=quiet, announce=True) as advance:
        done = 0
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            total, tokens = (torch.zeros((), dtype=torch.float64) for _ in range(2))
            for batch in batches_of(count, unit):
                share = validation_share(config, mesh, dealer, part, batch)
                if token_bytes is not None:
                    mine[number] += _target_bytes(share, token_bytes)
                loss = engine.evaluate(share.micro_batches)
                total += loss.total.cpu()  # waits for the device, so that the bar tells what is done
                tokens += loss.tokens.cpu()
                done += batch.count
                advance(done, samples)
            found.append(StepLoss(total, tokens, {}))
    if token_bytes is None:
        return found, [None] * len(parts)
    copies = mesh.layout.world_size // mesh.layout.data_size  # ranks that each have counted the same share
    return found, [round(each / copies) for each in mesh.sum(mine.to(mesh.device)).tolist()]


def batches_of(count: int, unit: int) -> Iterator[GlobalBatch]:
    """Cut so many samples into batches of at most AT_ONCE units, as equal as can be.

    unit: samples of a micro-batch on each data rank. All batches but the last are whole units, so that micro-batches have the
    same samples as if all were one batch.
    """
    units = -(-count // unit)
    batches = -(-units // AT_ONCE)
    bounds = [min(count, units * number // batches * unit) for number in range(batches + 1)] if batches else []
    return (GlobalBatch(first, end - first) for first, end in itertools.pairwise(bounds))


def source_names(parts: Sequence[ValidationPart]) -> list[str]:
    """Return the names of parts; of data that are one source, "data", or "training data" where a named set has that name."""
    taken = {part.name for part in parts}
    return [part.name or ("training data" if "data" in taken else "data") for part in parts]


def _result(
    config: RunConfig,
    checkpoint: str,
    step: int,
    mesh: Mesh,
    sources: Sequence[SourceLoss],
    weights: Sequence[float],
    found: Sequence[StepLoss],
) -> EvaluationResult:
    """Put the result together, with the means over sources.

    Bits per byte of all: those of text whose tokens come from the sources by their weights.
    """
    loss = weighted_mean(weights, found, [each.loss for each in sources]) if any(each.tokens for each in sources) else None
    bits = None
    if loss is not None and all(each.bytes is not None for each in sources):
        per_token = weighted_mean(weights, found, [(each.bytes or 0) / max(1, each.tokens) for each in sources])
        bits = loss / math.log(2) / per_token if per_token else None
    return EvaluationResult(checkpoint, step, mesh.layout.describe(), config.precision, loss, bits, tuple(sources))


def token_sizes(tokenizer: Tokenizer, vocabulary: int) -> np.ndarray:
    """Return the bytes of each token of the data, whose vocabulary may be padded beyond the tokenizer's."""
    sizes = tokenizer.byte_lengths()
    return np.concatenate([sizes, np.zeros(max(0, vocabulary - len(sizes)), np.int64)])


def _target_bytes(share: Share, sizes: np.ndarray) -> int:
    """Count the bytes of text of a share's targets. Blank rows have none."""
    targets = (batch.targets_BS.numpy() for batch in share.micro_batches)
    return sum(int(sizes[each[each != IGNORED]].sum()) for each in targets)
