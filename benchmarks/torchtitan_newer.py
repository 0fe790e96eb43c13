"""torchtitan 0.3.0 on random tokens under torch 2.11, with the shapes that torchtitan_synthetic.py gives 0.2.2.

    PYTHONPATH=FOLDER torchrun --standalone --nproc-per-node 1 benchmarks/torchtitan_newer.py model=moe_a batch=4 steps=28

FOLDER holds torchtitan==0.3.0 and what it needs beside 0.2.2's: spmd_types==0.2.3, torch_checkpointing.

0.3.0 is written for a newer PyTorch. The names that it imports and torch 2.11 lacks are put in here; on one rank none of them
does anything, and on several this has not been tried. Attention is PyTorch's, by cuDNN: its own choice on Hopper,
FlashAttention 3, has no wheel. The loss is its plain one, because its chunked one fails on torch 2.11.
"""

# pyright: reportMissingImports=false, reportUnknownLambdaType=false, reportUntypedBaseClass=false

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed.fsdp as fsdp
import torch.distributed.fsdp._fully_shard._fsdp_common as fsdp_common
import torch.nn.functional as F
from arguments import read
from torch.nn.attention import SDPBackend, sdpa_kernel

VOCABULARY, LENGTH, BATCHES = 128_256, 8192, 4
QWEN3 = {"dim": 2048, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "ffn_dim": 6144, "vocabulary": 151_936}
GEMMA3 = {"dim": 1152, "layers": 26, "heads": 4, "kv_heads": 1, "head_dim": 256, "ffn_dim": 6912, "vocabulary": 262_144}
DENSE = {"qwen3_1.7b": QWEN3, "gemma3_1b": GEMMA3}
"""Recipe → the shape of a dense Qwen3."""


@dataclasses.dataclass
class Settings:
    """One run. model: 1B, a mixture, moe_a or moe_b, or a dense Qwen3 (`DENSE`).

    balance: of a mixture, routed or forced; ep: ranks over which its experts are dealt
    """

    model: str = "moe_a"
    batch: int = 4
    steps: int = 28
    balance: str = "routed"
    ep: int = 1


@dataclasses.dataclass
class _Unused:
    shard: Any = None
    replicate: Any = None
    placement: Any = None
    mesh_info: Any = None


def make_up_for_newer_names() -> None:
    """Put in what torch 2.11 lacks. Must run before torchtitan is imported."""
    shard = fsdp.fully_shard

    def fully_shard(module: Any, *own: Any, dp_mesh_dims: Any = None, **named: Any) -> Any:
        return shard(module, *own, **named)

    fsdp.fully_shard = fully_shard
    if not hasattr(fsdp, "DataParallelMeshDims"):
        fsdp.DataParallelMeshDims = _Unused
    if not hasattr(fsdp_common, "ShardPlacementResult"):
        fsdp_common.ShardPlacementResult = _Unused
    setattr(torch.distributed, "set_timeout", lambda *_own, **_named: None)  # noqa: B010


make_up_for_newer_names()

import torchtitan.components.metrics as metrics  # noqa: E402
import torchtitan.models.common.attention as attention  # noqa: E402
import torchtitan.models.llama3 as llama3  # noqa: E402
import torchtitan.models.qwen3 as qwen3  # noqa: E402
from torchtitan.components.checkpoint import CheckpointManager  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.config.configs import DebugConfig  # noqa: E402
from torchtitan.tools.logging import init_logger  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402


class RandomTokens(BaseDataLoader):
    """The same few batches in every run, in pinned memory."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """It has no key."""

    def __init__(self, config: Config, **named: Any) -> None:
        size = named["local_batch_size"]
        draw = torch.Generator().manual_seed(0)
        vocabulary = named["tokenizer"].get_vocab_size()
        self._batches = [torch.randint(0, vocabulary, (size, LENGTH + 1), generator=draw) for _ in range(BATCHES)]
        self._positions = torch.arange(LENGTH).expand(size, LENGTH).contiguous().pin_memory()

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for tokens in itertools.cycle(self._batches):
            inputs = {"input": tokens[:, :-1].contiguous().pin_memory(), "positions": self._positions}
            yield inputs, tokens[:, 1:].contiguous().pin_memory()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was kept."""


class NoTokenizer(BaseTokenizer):
    """Random tokens need none but its size."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """vocabulary: of the random tokens."""

        vocabulary: int = VOCABULARY

    def __init__(self, config: Any, **_named: Any) -> None:
        self.eos_id, self._vocabulary = 0, config.vocabulary

    def encode(self, *_own: Any, **_named: Any) -> list[int]:
        """Nothing is encoded."""
        return []

    def decode(self, *_own: Any, **_named: Any) -> str:
        """Nothing is decoded."""
        return ""

    def get_vocab_size(self) -> int:
        """Return the number of random tokens."""
        return self._vocabulary


class Peaks:
    """Peaks of memory over the whole run; torchtitan's begin anew with each line of its log."""

    allocated = reserved = 0

    @classmethod
    def watch(cls) -> None:
        """See what torchtitan asks for its log."""
        ask = metrics.DeviceMemoryMonitor.get_peak_stats

        def get_peak_stats(monitor: Any) -> Any:
            cls.allocated = max(cls.allocated, torch.cuda.max_memory_allocated())
            cls.reserved = max(cls.reserved, torch.cuda.max_memory_reserved())
            return ask(monitor)

        metrics.DeviceMemoryMonitor.get_peak_stats = get_peak_stats


def _begin(self: Any, config: Any) -> None:
    super(attention.VarlenAttention, self).__init__()
    self.window_size = config.window_size


def _attend(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: Any = None, **_named: Any) -> torch.Tensor:
    """Attend in (B, L, heads, width), causally."""
    q, k, v = (each.bfloat16().transpose(1, 2) for each in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def spec_of(model: str) -> Any:
    """Return torchtitan's spec of a model."""
    if model == "1B":
        spec = llama3.model_registry("1B", attn_backend="varlen")
        spec.model.enable_weight_tying = False
        spec.model.tok_embeddings.param_init = llama3._EMBEDDING_INIT
        return spec
    if model in DENSE:
        return dense_spec(**DENSE[model])
    count, top_k, width = {"moe_a": (32, 4, 1024), "moe_b": (64, 8, 512)}[model]
    spec = qwen3.model_registry("30B-A3B", attn_backend="varlen")
    spec.model.vocab_size = spec.model.tok_embeddings.num_embeddings = spec.model.lm_head.out_features = VOCABULARY
    spec.model.layers = qwen3._build_qwen3_moe_layers(
        n_layers=16,
        dim=2048,
        n_heads=16,
        n_kv_heads=4,
        head_dim=128,
        moe_hidden_dim=width,
        num_experts=count,
        top_k=top_k,
        attn_backend="varlen",
        moe_comm_backend="standard",
        rope=qwen3.CosSinRoPE.Config(dim=128, max_seq_len=LENGTH, theta=1e6),
    )
    return spec


def dense_spec(dim: int, layers: int, heads: int, kv_heads: int, head_dim: int, ffn_dim: int, vocabulary: int) -> Any:
    """Return the spec of a Qwen3 of this shape, whose head has weights of its own."""
    spec = qwen3.model_registry("8B", attn_backend="varlen")  # the smallest with such a head
    model = spec.model
    model.dim = model.norm.normalized_shape = model.tok_embeddings.embedding_dim = model.lm_head.in_features = dim
    model.vocab_size = model.tok_embeddings.num_embeddings = model.lm_head.out_features = vocabulary
    model.layers = qwen3._build_qwen3_layers(
        n_layers=layers,
        dim=dim,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_dim=ffn_dim,
        attn_backend="varlen",
        rope=qwen3.CosSinRoPE.Config(dim=head_dim, max_seq_len=LENGTH, theta=1e6),
    )
    return spec


def main() -> None:
    """Train, and print the peaks of memory."""
    settings = read(Settings(), sys.argv[1:])
    spec = spec_of(settings.model)
    vocabulary = spec.model.vocab_size
    attention.VarlenAttention.__init__, attention.VarlenAttention.forward = _begin, _attend
    config = Trainer.Config(
        model_spec=spec,
        tokenizer=NoTokenizer.Config(vocabulary=vocabulary),
        dataloader=RandomTokens.Config(),
        optimizer=default_adamw(lr=3e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        metrics=MetricsProcessor.Config(log_freq=4),
        training=TrainingConfig(
            local_batch_size=settings.batch, seq_len=LENGTH, steps=settings.steps, disable_cuda_graphs=True
        ),
        loss=CrossEntropyLoss.Config(global_vocab_size=vocabulary),
        checkpoint=CheckpointManager.Config(enable=False),
        compile=CompileConfig(enable=True),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor", expert_parallel_degree=settings.ep),
        debug=DebugConfig(moe_force_load_balance=settings.balance == "forced"),
        activation_checkpoint=None,
        dump_folder=tempfile.mkdtemp(),
    )
    init_logger()
    Peaks.watch()
    config.build().train()
    print(f"peaks: allocated {Peaks.allocated / 2**30:.2f} GiB, reserved {Peaks.reserved / 2**30:.2f} GiB", flush=True)
    os._exit(0)  # its process group is not taken down under this PyTorch


if __name__ == "__main__":
    main()
