"""Division of a model's blocks among pipeline stages and activation policies, from configs alone. Imports no torch."""

from __future__ import annotations

from ..models.config import DecoderConfig
from .config import ParallelConfig
from .pipeline.stages import StagePlan, balanced_stages
from .policies import ActivationSettings, block_policies


def divide_blocks(
    shape: DecoderConfig | None, blocks: int, parallel: ParallelConfig, activation: ActivationSettings, seq_len: int
) -> tuple[tuple[str, ...], StagePlan]:
    """Choose the activation policy of every block, and the layers of every stage.

    shape: None for a model that is no decoder, which has one stage; blocks: their number; seq_len: positions per sample.
    Raises ValueError for an activation budget that no choice of policies keeps to.
    """
    if shape is None:
        return (activation.policy,) * blocks, StagePlan.single(blocks)
    policies = block_policies(shape, parallel, activation)
    return tuple(policies), balanced_stages(shape, parallel, seq_len, policies)
