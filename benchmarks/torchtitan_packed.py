"""torchtitan 0.2.2 on the rows of packed documents of `packed_documents.py`, with its variable-length or flex attention.

    python benchmarks/torchtitan_packed.py out=results.jsonl rows=8192,32768 attention=varlen

Its own trainer takes the steps; only the tokens are ours. torchtitan finds documents by their last token. Where memory does not
suffice with an activation policy (none, selective, full), the next one is tried in a process of its own. It needs the packages
that `torchtitan_synthetic.py` names.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchtitan.protocols.train_spec as train_spec
import torchtitan.train as titan
from arguments import read
from packed_rows import END, draw_rows, micro_batch
from torchtitan.config import ConfigManager
from torchtitan.models.llama3 import TransformerModelArgs, llama3_args

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 512, "ffn_dim_multiplier": 0.75},
    "1B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024, "ffn_dim_multiplier": 1.5},
    "3B": {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "multiple_of": 1024, "ffn_dim_multiplier": 1.0},
}
NEXT = {"none": "selective", "selective": "full"}


@dataclass
class Settings:
    """As those of `packed_documents.py`. attention: varlen or flex."""

    part: str = "rows"
    out: str = ""
    model: str = "1B"
    vocabulary: int = 128_256
    lengths: str = "magi,github"
    rows: str = "8192,32768"
    tokens: int = 65_536
    at_once: int = 32_768
    longest: int = 0
    activation: str = "none"
    attention: str = "varlen"
    warmup: int = 2
    steps: int = 3


class Ends:
    """The part of a tokenizer that torchtitan asks for: the token that ends a document."""

    eos_id = END


def spec_of(name: str, original: Any = train_spec.get_train_spec) -> Any:
    """torchtitan's own parts, without its tokenizer and data."""
    spec = original(name)
    spec.build_tokenizer_fn = lambda _config: Ends()
    spec.build_dataloader_fn = None
    return spec


def trainer_of(settings: Settings, longest: int) -> titan.Trainer:
    """Build torchtitan's trainer for rows of up to `longest` tokens."""
    llama3_args["packed"] = TransformerModelArgs(
        rope_theta=500_000, vocab_size=settings.vocabulary, attn_type=settings.attention, attn_mask_type="block_causal",
        eos_id=END, **SHAPES[settings.model],
    )  # fmt: skip
    train_spec.get_train_spec = spec_of
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="29511")
    words = ["--model.name", "llama3", "--model.flavor", "packed", "--training.steps", "1000", "--metrics.log_freq", "100000"]
    words += ["--training.local_batch_size", "1", "--training.seq_len", str(longest), "--compile.enable"]
    words += ["--activation_checkpoint.mode", settings.activation]
    if settings.activation == "selective":
        words += ["--activation_checkpoint.selective_ac_option", "op"]
    trainer = titan.Trainer(ConfigManager().parse_args(words))
    trainer.step = 1  # after the first step its log would count what its own loop has loaded
    return trainer


def batches_of(
    rows: Sequence[Sequence[int]], micro: int, vocabulary: int
) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """The micro-batches as torchtitan's loaders give them: on the host, in pinned memory."""
    found: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
    for at in range(0, len(rows), micro):
        batch = micro_batch(rows[at : at + micro], vocabulary, at)
        found.append(({"input": batch.tokens_BS.pin_memory()}, batch.targets_BS.pin_memory()))
    return found


def measure(settings: Settings, trainer: Any, batches: Sequence[Any], passes: int) -> dict[str, Any]:
    """Take torchtitan's steps over the batches in turn."""
    trainer.gradient_accumulation_steps = passes

    def copies() -> Iterator[Any]:
        for inputs, labels in itertools.cycle(batches):
            yield dict(inputs), labels  # its step puts what it has copied to the GPU into the dict

    iterator = copies()

    def step() -> None:
        trainer.step += 1
        trainer.train_step(iterator)

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    for _ in range(1, settings.warmup):
        step()
    gc.collect()
    seconds: list[float] = []
    for _ in range(settings.steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return {
        "step_seconds": round(statistics.median(seconds), 4),
        "least": round(min(seconds), 4),
        "most": round(max(seconds), 4),
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1),
        "first_step_seconds": round(first, 1),
    }


def main() -> None:
    """Measure each length of rows and each distribution; with the next activation policy where memory does not suffice."""
    settings = read(Settings(), sys.argv[1:])
    lengths = list(map(int, settings.rows.split(",")))
    trainer = trainer_of(settings, max(lengths))
    told = {"part": settings.part, "system": "torchtitan", "model": settings.model, "torch": torch.__version__}
    told |= {"activation": settings.activation, "attention": settings.attention, "vocabulary": settings.vocabulary}
    left = [(length, name) for length in lengths for name in settings.lengths.split(",")]
    latest = 0
    for number, (length, name) in enumerate(left):
        if length != latest:
            torch._dynamo.reset()
            latest = length
        micro, passes = max(1, settings.at_once // length), max(1, settings.tokens // max(length, settings.at_once))
        rows = draw_rows(name, length, 2 * micro * passes, settings.longest or length)
        line = {**told, "rows": length, "lengths": name}
        try:
            found = measure(settings, trainer, batches_of(rows, micro, settings.vocabulary), passes)
            rate = round(micro * passes * length / found["step_seconds"])
            write(settings, {**line, "tokens_per_second_per_gpu": rate, **found})
        except torch.OutOfMemoryError as problem:
            write(settings, {**line, "error": f"OutOfMemoryError: {str(problem)[:120]}"})
            if settings.activation in NEXT:
                again(settings, left[number:])
            return


def write(settings: Settings, line: dict[str, Any]) -> None:
    """Print a line, and append it to `out`."""
    print(json.dumps(line), flush=True)
    if settings.out:
        with Path(settings.out).open("a") as file:
            file.write(json.dumps(line) + "\n")


def again(settings: Settings, left: Sequence[tuple[int, str]]) -> None:
    """Become a process that measures what is left with the next activation policy: this one's memory is gone with it."""
    lengths = ",".join(dict.fromkeys(str(length) for length, _ in left))
    kept = [word for word in sys.argv[1:] if not word.startswith(("rows=", "activation="))]
    os.execv(sys.executable, [sys.executable, __file__, *kept, f"rows={lengths}", f"activation={NEXT[settings.activation]}"])


if __name__ == "__main__":
    main()
