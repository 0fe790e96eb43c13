"""Make the dealer of a run's documents under hybrid data parallelism. Imports no torch."""

from __future__ import annotations

from ..config.problems import ConfigError, Problem
from ..models.config import DecoderConfig
from ..parallel.hybrid.cost import CostModel
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
    row, measured = config.batch.micro_size * config.data.seq_len, None
    if config.parallel.hdp_costs is not None:
        if shape is None:
            raise ConfigError([Problem("parallel.hdp_costs", "only the costs of decoders are known", "use null")])
        cluster = load_cluster([f"cluster={config.parallel.hdp_costs}"])
        job = job_of(config, shape, assigner_of(config, layout), fused=None)
        measured = document_costs(shape, config.parallel, layout, job, cluster)
    compiled = config.trainer.compile
    return HybridAssigner.of(config.parallel, layout, row, flops, compiled=compiled, measured=measured)
