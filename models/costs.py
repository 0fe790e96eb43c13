"""Parameters, FLOPs and activation bytes of a decoder, as pure functions of its config. Imports no torch.

Bytes of activations are estimated from the tensors that a block's operations keep. Counts of parameters and matrix FLOPs
are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..config.precision import PRECISIONS
from ..kernels.limits import LOSS_CHUNK
from .config import DecoderConfig
from .mixture.config import MixtureConfig
from .mixture.costs import kept_beside, kept_by_kernels, recomputed_matrices
from .part_config import BlockConfig

FLOPS_PER_BYTE = 165.0
"""FLOPs that an accelerator computes while it moves one byte (H200: 790 TFLOP/s measured, 4.8 TB/s), for lookups."""


@dataclass(frozen=True)
class ForwardPass:
    """The conditions of a rank's forward pass of a micro-batch.

    tokens             positions of the micro-batch on the rank, all samples together, before tensor parallelism cuts them
    precision          one of PRECISIONS
    tp                 ranks that share each block
    sequence_parallel  whether these ranks also cut the residual stream along the sequence
    compiled           whether blocks are compiled
    fused_swiglu       whether SwiGLU is computed inside the products around it (`kernels/swiglu.py`)
    fused_experts      whether experts are computed by `kernels/experts/`; None: not known, what keeps more is counted
    """

    tokens: int
    precision: str
    tp: int = 1
    sequence_parallel: bool = False
    compiled: bool = False
    fused_swiglu: bool = False
    fused_experts: bool | None = None

    @property
    def stream_cut(self) -> int:
        """The number of ranks that share the residual stream."""
        return self.tp if self.sequence_parallel else 1


def parameter_count(config: DecoderConfig, *, embedding: bool = True, active: bool = False) -> int:
    """Count the parameters of the whole model. embedding: whether to count the embedding; the head always counts.

    active: count only what one token is computed with: of a mixture's experts, those that it chooses.
    """
    table = config.known_vocabulary * config.dim
    total = hidden_parameter_count(config, active=active) + table * (1 if config.tied else 2)
    return total if embedding or config.tied else total - table


def hidden_parameter_count(config: DecoderConfig, *, active: bool = False) -> int:
    """Count the parameters without embedding and head. The vocabulary need not be known. active: see `parameter_count`."""
    blocks = (
        block.active_matrices + block.active_vectors if active else block.matrices + block.vectors for block in config.blocks()
    )
    return sum(blocks) + config.dim + sum(map(math.prod, config.experts.cell_shapes.values()))


def flops_per_token(config: DecoderConfig, seq_len: int) -> float:
    """Count forward and backward FLOPs per token: 6 per active parameter, and 12·heads·head_dim·seq_len a layer for attention.
    The cell of recurrent routers counts once in each layer that uses it.

    The convention of PaLM's appendix B (and torchtitan): attention counted in full although half is masked, the embedding
    not counted, recomputation not counted.
    """
    scores = sum(block.attention.score_flops(seq_len) for block in config.blocks())
    again = sum(map(math.prod, config.experts.cell_shapes.values())) * (len(config.mixture_layers()) - 1)  # counted once below
    return 6 * (parameter_count(config, embedding=False, active=True) + max(0, again)) + 3 * scores


def layer_flops(block: BlockConfig, seq_len: int) -> float:
    """Count forward FLOPs of one block per token: 2 per active matrix parameter, and the causal half of attention."""
    cell = block.ffn.cell_matrices if isinstance(block.ffn, MixtureConfig) else 0
    return 2.0 * (block.active_matrices + cell) + block.attention.score_flops(seq_len) / 2


def recomputed_flops(
    block: BlockConfig, policy: str, seq_len: int, *, fused_experts: bool = False, compiled: bool = False
) -> float:
    """Count the FLOPs per token that a block's backward pass spends on computing activations again.

    A block's last product is computed again only where a norm reads it. fused_experts, compiled: see `ForwardPass`.
    """
    if isinstance(block.ffn, MixtureConfig):
        feed_forward = recomputed_matrices(
            block.ffn, policy, last_read=block.norms_after, fused=fused_experts, compiled=compiled
        )
    else:
        feed_forward = block.ffn.recomputed_matrices(policy, last_read=block.norms_after)
    attention = 2.0 * block.attention.matrices + block.attention.score_flops(seq_len) / 2 if policy == "full" else 0.0
    return attention + 2.0 * feed_forward


def head_flops(config: DecoderConfig) -> float:
    """Count the forward FLOPs of the head per token."""
    return 2.0 * config.dim * config.known_vocabulary


def embedding_flops(config: DecoderConfig) -> float:
    """Price a lookup, which computes nothing: the FLOPs that fit in the time of moving its row, 2 bytes an element each way."""
    return 4.0 * config.dim * FLOPS_PER_BYTE


def block_bytes(block: BlockConfig, work: ForwardPass, policy: str) -> int:
    """Estimate the bytes that one block keeps of one micro-batch for its backward pass, under an activation policy.

    Counted tensor by tensor as in arXiv 2205.05198, for RMSNorm, rotary positions, fused attention and SwiGLU. D is the
    stream's width, Q that of all query heads, K that of all key heads, F the feed-forward's; t and s are the tensor-parallel
    cuts of features and of the stream.

    Norms keep inputs 2 D/s and outputs 2 D. Attention keeps q, k, v and its output, (2 Q + 2 K)/t. SwiGLU keeps 4 F/t: gate,
    up, silu(gate) and the product. A compiled block recomputes only silu, because the compiler keeps every factor of a
    matrix product. SwiGLU inside the products keeps neither silu(gate) nor the product. Norms and softmax also keep a few
    numbers per position, in the accumulation's precision.

    Norms of queries and keys keep their inputs, too, and norms after a part that part's output, D/s. An activation other than
    silu keeps as much, biases nothing; sinks keep nothing besides the log-sum-exp, nor does a window.

    A mixture of experts has F of the experts that a token passes, and keeps more (`mixture/costs.py`). Its products are
    not compiled.

    Selective checkpointing keeps the block's input, q, k, v, attention's output and its projection, and one of the gate's two
    factors; of a mixture instead the router's first product and its choice. Kernels of experts keep gate and up under either
    policy. With a router of a user's own, which may leave choices untaken as kernels can't, what keeps more is counted.
    """
    return max(_kept_bytes(block, replace(work, fused_experts=fused), policy) for fused in _kernels_of_experts(block, work))


def _kernels_of_experts(block: BlockConfig, work: ForwardPass) -> tuple[bool, ...]:
    """Return whether kernels compute a block's experts; both answers where only the run will show it."""
    if not isinstance(block.ffn, MixtureConfig):
        return (False,)
    own_router = block.ffn.keys.parts.router is not None
    if work.fused_experts is not None and not (work.fused_experts and own_router):
        return (work.fused_experts,)
    may_fuse = block.ffn.can_fuse and work.precision == "bf16" and work.tp == 1
    return (False, True) if may_fuse else (False,)


def _kept_bytes(block: BlockConfig, work: ForwardPass, policy: str) -> int:
    """Estimate what a block keeps with the kernels that are named: see `block_bytes`."""
    mixture = block.ffn if isinstance(block.ffn, MixtureConfig) else None
    fused = mixture is not None and bool(work.fused_experts)
    unit, accum = PRECISIONS[work.precision].bytes, PRECISIONS[work.precision].accum_bytes
    attention, dim = block.attention, block.attention.dim
    stream = dim / work.stream_cut
    ffn = block.ffn.ffn_dim / (work.tp if mixture is None else work.stream_cut)  # tokens of experts are cut, not features
    heads = attention.kept(work.tp)
    log_sums = accum * attention.heads / work.tp
    if not isinstance(block.ffn, MixtureConfig):
        beside = block.ffn.kept_beside(policy, unit, accum)
    elif fused:
        beside = kept_by_kernels(block.ffn, policy, unit, accum, work.compiled)
    else:
        beside = kept_beside(block.ffn, policy, unit, accum) / work.stream_cut
    if policy == "full":
        per_token = unit * stream + beside
    elif policy == "offload":
        per_token = 0.0
    elif policy == "selective":
        gate = 0 if mixture is not None else ffn
        per_token = unit * (stream + heads + dim + gate) + log_sums + beside
    else:
        wide = 2 if work.fused_swiglu and block.ffn.is_plain_swiglu else 3 if work.compiled and not block.ffn.dispatched else 4
        wide = 0 if fused else wide if mixture is None or mixture.keys.gated else 2
        before, after = 2 * block.norms_before, 2 * block.norms_after
        # Without norms before, products read the stream itself, or what is gathered of it.
        apart = block.norms_before or work.stream_cut > 1
        reads = dim if apart else 0
        if not apart and mixture is None:
            beside = 0.0
        normed = attention.kept_normed(work.tp)
        moments = (before + after) / work.stream_cut + attention.normed_rows / work.tp
        elements = (2 + after) * stream + reads + heads + normed + wide * ffn
        per_token = unit * elements + log_sums + accum * moments + beside
    return round(work.tokens * per_token)


def loss_bytes(config: DecoderConfig, work: ForwardPass) -> int:
    """Estimate the bytes that final norm, head and loss hold of one micro-batch.

    They are the hidden states and their gradient, the head's gradient, and a chunk of logits.
    """
    unit, accum = PRECISIONS[work.precision].bytes, PRECISIONS[work.precision].accum_bytes
    rows = -(-config.known_vocabulary // work.tp)
    states = work.tokens * config.dim * unit * 3
    # The head's gradient is accumulated in `accum` while a chunk's logits exist, and cast after they are freed.
    return states + rows * config.dim * accum + max(min(LOSS_CHUNK, work.tokens), config.dim) * rows * unit
