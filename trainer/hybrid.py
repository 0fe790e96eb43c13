"""Make what hybrid data parallelism needs of a run: a dealer, and the rule of what rows keep on the host. Imports no torch."""

from __future__ import annotations

from ..config.problems import ConfigError, Problem
from ..models.config import DecoderConfig
from ..models.costs import block_bytes
from ..parallel.hybrid.cost import CostModel
from ..parallel.hybrid.hidden_copies import HiddenCopies
from ..parallel.hybrid.share import HybridAssigner
from ..parallel.layout import Layout
from ..planner.cluster import load_cluster
from ..planner.document_costs import document_costs
from .costs import assigner_of, job_of
from .schema import RunConfig


def hybrid_dealer(config: RunConfig, layout: Layout, shape: DecoderConfig | None, flops: CostModel) -> HybridAssigner:
    """Make the dealer that a config asks for.

    shape: of a decoder whose vocabulary is known, None of another model; flops: of the model by the length of a document
    """
    row = config.batch.micro_size * config.data.seq_len
    measured = None if config.parallel.hdp_costs is None else _measured_costs(config, layout, shape)
    compiled = config.trainer.compile
    return HybridAssigner.of(config.parallel, layout, row, flops, compiled=compiled, measured=measured)


def hidden_copies(config: RunConfig, layout: Layout, shape: DecoderConfig | None) -> HiddenCopies | None:
    """Return the rule of what rows keep on the host; None without `parallel.hdp_offload`. shape: as above."""
    if not config.parallel.hdp_offload or shape is None:
        return None
    work = job_of(config, shape, assigner_of(config, layout), fused=None).forward_pass(config.parallel)
    token_bytes = sum(block_bytes(block, work, "none") for block in shape.blocks()) / work.tokens
    rate = load_cluster([f"cluster={config.parallel.hdp_costs}"]).host_link * 1e9
    return HiddenCopies(_measured_costs(config, layout, shape), token_bytes, rate)


def _measured_costs(config: RunConfig, layout: Layout, shape: DecoderConfig | None) -> CostModel:
    """Predict seconds of documents by the rates of `parallel.hdp_costs`."""
    if shape is None:
        raise ConfigError([Problem("parallel.hdp_costs", "only the costs of decoders are known", "use null")])
    cluster = load_cluster([f"cluster={config.parallel.hdp_costs}"])
    return document_costs(
        shape, config.parallel, layout, job_of(config, shape, assigner_of(config, layout), fused=None), cluster
    )
