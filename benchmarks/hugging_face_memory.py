"""Cost of beginning from a Hugging Face folder: peak of host memory, bytes read by each rank, seconds.

    python benchmarks/hugging_face_memory.py [layers=24] [dim=1024] [ranks=1,4]

Writes a Llama of bf16 weights in files of at most 200 MB. Then ranks fill what they hold from `hf:<folder>`: equal rows of
every weight in fp32, as ZeRO-3 does, or equal columns of the matrices. Peaks are above what they hold. At last the folder is
imported, and the import exported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from arguments import read

from meshloom.checkpoint.control import Control
from meshloom.checkpoint.convert.hugging_face.folder import weight_shapes
from meshloom.checkpoint.restore import restore
from meshloom.models.config import DECODER, decoder_config
from meshloom.models.families import FAMILIES
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment
from support.ranks import run_ranks

SHARD_BYTES = 200 * 10**6
MIB = 2**20


@dataclass
class Settings:
    """Sizes of the model; numbers of ranks, with commas."""

    layers: int = 24
    dim: int = 1024
    ranks: str = "1,4"


def model_of(settings: Settings) -> dict[str, Any]:
    """Return the keys of the model."""
    sizes = {"dim": settings.dim, "layers": settings.layers, "heads": settings.dim // 64, "kv_heads": settings.dim // 128}
    return {"_target_": DECODER, **sizes, "ffn_dim": settings.dim * 11 // 4, "vocabulary": 32_000, "tied": False}


def write_folder(folder: Path, model: dict[str, Any]) -> int:
    """Write the folder. Returns the bytes of its weights."""
    config, family = decoder_config(model), FAMILIES["llama"]
    stored = family.stored_weights(config)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = number = 0

    def flush() -> None:
        nonlocal number
        number += 1
        save_file(shard, folder / f"model-{number:05d}.safetensors")
        weight_map.update(dict.fromkeys(shard, f"model-{number:05d}.safetensors"))
        shard.clear()

    for ours, shape in weight_shapes(model).items():
        shard[stored[ours][0].name] = torch.randn(shape, dtype=torch.bfloat16)
        total += shard[stored[ours][0].name].nbytes
        if sum(each.nbytes for each in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "config.json").write_text(json.dumps(family.to_hugging_face(config)))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def memory(key: str) -> int:
    """Return VmHWM or VmRSS of this process, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def fill(rank: int, world_size: int, folder: str, shapes: Mapping[str, tuple[int, ...]], dim: int) -> tuple[float, ...]:
    """Return MiB held, MiB of the peak above it, MiB read, and seconds."""
    held: list[Fragment] = []
    for name, shape in shapes.items():
        along = dim if len(shape) > 1 else 0
        size = shape[along] // world_size
        offsets, extent = [0] * len(shape), list(shape)
        offsets[along], extent[along] = rank * size, size
        held.append(Fragment(name, "weight", shape, Box(tuple(offsets), tuple(extent)), torch.full(extent, 0.5)))
    group = dist.new_group(backend="gloo") if world_size > 1 else None
    store = dist.FileStore(f"{folder}.store-{world_size}-{dim}", world_size)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    report = restore(f"hf:{folder}", held, Control(rank, world_size, store), group=group)
    own = sum(each.tensor.nbytes for each in held)
    return own / MIB, (memory("VmHWM") - before) / MIB, report.bytes_read / MIB, report.seconds


def command(*words: str) -> float:
    """Return the peak of a `meshloom checkpoint` command, in MiB."""
    code = (
        "import re, sys; from meshloom.launch.checkpoint import main; code = main(sys.argv[1:]);"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Run it, and print the tables."""
    settings = read(Settings(), sys.argv[1:])
    model = model_of(settings)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "theirs"
        folder.mkdir()
        print(f"{write_folder(folder, model) / MIB:.0f} MiB of weights in {len(list(folder.glob('*.safetensors')))} files\n")
        print(
            "| Ranks | Cut by | A rank holds, MiB | Peak above it, MiB | A rank reads, MiB | s |\n|---|---|---:|---:|---:|---:|"
        )
        shapes = weight_shapes(model)
        for count in map(int, settings.ranks.split(",")):
            for dim, name in ((0, "rows"), (1, "columns"))[: 1 if count == 1 else 2]:
                rows = run_ranks(count, fill, str(folder), shapes, dim, timeout=600.0)
                own, peak, taken, seconds = (max(column) for column in zip(*rows, strict=True))
                print(f"| {count} | {name} | {own:.0f} | {peak:.0f} | {taken:.0f} | {seconds:.1f} |", flush=True)
        small = Path(place) / "small"
        small.mkdir()
        write_folder(small, model_of(Settings(1, 128)))
        begun = time.perf_counter()
        idle, peak = command("import", str(small), f"{place}/a"), command("import", str(folder), f"{place}/b")
        print(f"\nimport: {peak - idle:.0f} MiB above that of a model of 16 MiB, {time.perf_counter() - begun:.0f} s both")
        idle, peak = command("export", f"{place}/a", f"{place}/c"), command("export", f"{place}/b", f"{place}/d")
        print(f"export: {peak - idle:.0f} MiB above that of a model of 16 MiB")


if __name__ == "__main__":
    main()
