"""torchtitan 0.2.2 on synthetic tokens: the peer that `throughput.py` is compared with, same shapes, same machine.

    torchrun --standalone --nproc-per-node 1 benchmarks/torchtitan_synthetic.py --training.steps 16 --metrics.log_freq 4 \
        --model.flavor 1B --training.local_batch_size 4 --training.seq_len 8192 --compile.enable \
        --activation_checkpoint.mode none

Flavors 1B, 3B and 8B have the shapes of the recipes llama_1b, llama_3b and llama_8b (vocabulary 128,256, untied). Needs
torchtitan==0.2.2 and what it needs. It prints tps: tokens per second per GPU.
"""

import os

import torch
import torchtitan.protocols.train_spec as train_spec
import torchtitan.train as titan
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args

VOCABULARY = 128_256
COMMON = {"n_kv_heads": 8, "rope_theta": 500_000, "vocab_size": VOCABULARY}
llama3_args["1B"] = TransformerModelArgs(dim=2048, n_layers=16, n_heads=32, ffn_dim_multiplier=1.5, multiple_of=1024, **COMMON)
llama3_args["3B"] = TransformerModelArgs(dim=3072, n_layers=28, n_heads=24, ffn_dim_multiplier=1.0, multiple_of=1024, **COMMON)
llama3_args["8B"].vocab_size = VOCABULARY


class SyntheticTokens:
    """Seeded random tokens per data-parallel rank, in the form that torchtitan's trainer reads."""

    def __init__(self, dp_world_size, dp_rank, tokenizer, job_config):
        self.shape = (job_config.training.local_batch_size, job_config.training.seq_len + 1)
        self.generator = torch.Generator().manual_seed(dp_rank)

    def __iter__(self):
        while True:
            tokens = torch.randint(0, VOCABULARY, self.shape, generator=self.generator)
            yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

    def state_dict(self):
        """Nothing to save."""
        return {}

    def load_state_dict(self, state):
        """Nothing to restore."""


def synthetic_spec(name, original=train_spec.get_train_spec):
    """The model's spec with synthetic tokens in place of tokenizer and data."""
    spec = original(name)
    spec.build_tokenizer_fn = None
    spec.build_dataloader_fn = SyntheticTokens
    return spec


titan.train_spec_module.get_train_spec = synthetic_spec

if __name__ == "__main__":  # its process-based checkpoint saver imports this file again
    titan.main(titan.Trainer)
    if os.environ.get("RANK", "0") == "0":
        print("peak GiB", torch.cuda.max_memory_allocated() / 2**30)
