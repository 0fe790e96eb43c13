"""Make what hybrid data parallelism needs of a run: a dealer, and the rule of what rows keep on the host. Imports no torch."""

from __future__ import annotations

from ..config.problems import ConfigError, Problem
from ..models.config import DecoderConfig
from ..models.costs import block_bytes
from ..parallel.hybrid.cost import CostModel
from ..parallel.hybrid.hidden_copies import PINNED, HiddenCopies
from ..parallel.hybrid.share import HybridAssigner
from ..parallel.layout import Layout
from ..planner.cluster import GIB, load_cluster
from ..planner.document_costs import document_costs
from .costs import assigner_of, job_of
from .schema import RunConfig

PINNED_PART = 0.5
"""Of a host's memory, what its ranks' rows may pin. Snapshots of checkpoints, loaders and the system need the rest."""


def hybrid_dealer(config: RunConfig, layout: Layout, shape: DecoderConfig | None, flops: CostModel) -> HybridAssigner:
    """Make the dealer that a config asks for.

    shape: of a decoder whose vocabulary is known, None of another model; flops: of the model by the length of a document
    """
    row = config.batch.micro_size * config.data.seq_len
    measured = None if config.parallel.hdp_costs is None else _measured_costs(config, layout, shape)
    compiled = config.trainer.compile
    return HybridAssigner.of(config.parallel, layout, row, flops, compiled=compiled, measured=measured)


def hidden_copies(config: RunConfig, layout: Layout, shape: DecoderConfig | None) -> HiddenCopies | None:
    """Return the rule of what rows keep on the host; None without `parallel.hdp_offload`. shape: as above.

    Raises ConfigError if a rank's part of the host's memory holds no block of a full row.
    """
    if not config.parallel.hdp_offload or shape is None:
        return None
    work = job_of(config, shape, assigner_of(config, layout), fused=None).forward_pass(config.parallel)
    token_bytes = sum(block_bytes(block, work, "none") for block in shape.blocks()) / work.tokens
    cluster = load_cluster([f"cluster={config.parallel.hdp_costs}"])
    host_bytes = PINNED_PART / PINNED * cluster.host_memory * GIB / min(cluster.gpus_per_node, layout.world_size)
    least = token_bytes * work.tokens / shape.layers
    if host_bytes < least:
        text = f"a block of a row keeps {least / GIB:.2g} GiB, and a rank's part of the host's memory is {host_bytes / GIB:.2g}"
        raise ConfigError([Problem("parallel.hdp_offload", text, "use false, or lower parallel.hdp_tokens")])
    costs = _measured_costs(config, layout, shape, with_ends=False)
    return HiddenCopies(costs, token_bytes, cluster.host_link * 1e9, host_bytes)


def _measured_costs(config: RunConfig, layout: Layout, shape: DecoderConfig | None, *, with_ends: bool = True) -> CostModel:
    """Predict seconds of documents by the rates of `parallel.hdp_costs`. with_ends: see `document_costs`."""
    if shape is None:
        raise ConfigError([Problem("parallel.hdp_costs", "only the costs of decoders are known", "use null")])
    cluster = load_cluster([f"cluster={config.parallel.hdp_costs}"])
    job = job_of(config, shape, assigner_of(config, layout), fused=None)
    return document_costs(shape, config.parallel, layout, job, cluster, with_ends=with_ends)
