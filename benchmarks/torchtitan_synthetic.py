"""torchtitan 0.2.2 on random tokens, with the shapes of the recipes llama_1b, llama_3b and llama_8b, to compare with.

    torchrun --standalone --nproc-per-node 1 benchmarks/torchtitan_synthetic.py --model.flavor 1B --training.steps 32 \
        --training.local_batch_size 4 --training.seq_len 8192 --metrics.log_freq 4 --compile.enable \
        --activation_checkpoint.mode none

A mixture of experts, A or B of docs/measurements/mixture_speed.md: --model.name qwen3 --model.flavor moe_a (or moe_b), and
--debug.moe_force_load_balance for a forced balance.

A dense Qwen3 with an untied head, of the dims of a recipe: --model.name qwen3 --model.flavor qwen3_1.7b (or gemma3_1b, the
nearest that torchtitan has to Gemma 3: it has SwiGLU, two norms a block, and full attention in every layer).

It needs the packages torchtitan==0.2.2, torchdata, tyro and datasets, and torchao for float8:

    --model.converters quantize.linear.float8 --quantize.linear.float8.enable_fsdp_float8_all_gather \
    --quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp --quantize.linear.float8.filter_fqns output
"""

# pyright: reportMissingImports=false, reportUnknownLambdaType=false, reportUntypedBaseClass=false

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
import torchtitan.components.metrics as metrics
import torchtitan.protocols.train_spec as train_spec
import torchtitan.train as titan
from torchtitan.components.metrics import DeviceMemoryMonitor
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs, qwen3_args

VOCABULARY = 128_256
BATCHES = 4
COMMON = {"n_kv_heads": 8, "rope_theta": 500_000, "vocab_size": VOCABULARY, "multiple_of": 1024}
llama3_args["1B"] = TransformerModelArgs(dim=2048, n_layers=16, n_heads=32, ffn_dim_multiplier=1.5, **COMMON)
llama3_args["3B"] = TransformerModelArgs(dim=3072, n_layers=28, n_heads=24, ffn_dim_multiplier=1.0, **COMMON)
llama3_args["8B"].vocab_size = VOCABULARY
for name, (count, top_k, width) in {"moe_a": (32, 4, 1024), "moe_b": (64, 8, 512)}.items():
    choice = {"num_experts": count, "num_shared_experts": 0, "top_k": top_k, "score_func": "softmax", "route_norm": True}
    qwen3_args[name] = Qwen3ModelArgs(
        vocab_size=VOCABULARY,
        dim=2048,
        n_layers=16,
        n_heads=16,
        n_kv_heads=4,
        head_dim=128,
        qk_norm=True,
        hidden_dim=4096,
        moe_enabled=True,
        moe_inter_dim=width,
        moe_args=MoEArgs(score_before_experts=False, **choice),
    )

qwen3_args["qwen3_1.7b"] = Qwen3ModelArgs(
    dim=2048, n_layers=28, n_heads=16, n_kv_heads=8, head_dim=128, hidden_dim=6144, vocab_size=151_936
)
qwen3_args["gemma3_1b"] = Qwen3ModelArgs(
    dim=1152, n_layers=26, n_heads=4, n_kv_heads=1, head_dim=256, hidden_dim=6912, vocab_size=262_144
)

original_spec = train_spec.get_train_spec


class RandomTokens:
    """torchtitan's data loader: the same few batches for each data-parallel rank in every run.

    On the host, where torchtitan counts the labels, and in pinned memory, from which its copies to the GPU are quick.
    """

    def __init__(self, dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any) -> None:
        shape = (job_config.training.local_batch_size, job_config.training.seq_len + 1)
        draw = torch.Generator().manual_seed(dp_rank)
        vocabulary = synthetic(job_config.model.name).model_args[job_config.model.flavor].vocab_size
        drawn = [torch.randint(0, vocabulary, shape, generator=draw) for _ in range(BATCHES)]
        self._batches = [
            (tokens[:, :-1].contiguous().pin_memory(), tokens[:, 1:].contiguous().pin_memory()) for tokens in drawn
        ]

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for tokens, labels in itertools.cycle(self._batches):
            yield {"input": tokens}, labels

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was kept."""


class Peaks(DeviceMemoryMonitor):
    """torchtitan's account of memory, which begins anew with each line of its log, over the whole run and of both kinds.

    allocated  bytes of tensors; reserved: what the allocator holds for them, which is what torchtitan logs
    """

    allocated = reserved = 0

    def get_peak_stats(self) -> Any:
        """As torchtitan wants it."""
        Peaks.allocated = max(Peaks.allocated, torch.cuda.max_memory_allocated())
        Peaks.reserved = max(Peaks.reserved, torch.cuda.max_memory_reserved())
        return super().get_peak_stats()


def synthetic(name: str) -> Any:
    """torchtitan's spec of a model, without tokenizer and files."""
    spec = original_spec(name)
    spec.build_tokenizer_fn = None
    spec.build_dataloader_fn = RandomTokens
    return spec


titan.train_spec_module.get_train_spec = synthetic
metrics.DeviceMemoryMonitor = Peaks

if __name__ == "__main__":
    titan.main(titan.Trainer)
    if os.environ.get("RANK", "0") == "0":
        print(f"peaks: allocated {Peaks.allocated / 2**30:.2f} GiB, reserved {Peaks.reserved / 2**30:.2f} GiB", flush=True)
