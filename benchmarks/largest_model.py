"""The largest model that trains on one GPU with each level of offloading, beside what `meshloom plan`'s account says of it.

    python benchmarks/largest_model.py levels=none,weights host=116 disk=50 path=/nvme
    python benchmarks/largest_model.py levels=torch,none,optimizer,weights,nvme gpu=24 host=48 steps=2

Models are Llamas of one width with more and more blocks (0.218 B parameters each at the default width of 4,096, and 0.262 B
for embedding and head). A level's sizes are tried in increasing order, `step` blocks apart, from `below` steps under the
largest that the account lets fit, until one fails, or the account says that it does not fit into `host` or `disk` GiB, or
`seconds` are over; a size that the account refuses for the GPU alone is tried (running out there is quick and harms nobody).
Each try is a process of its own that takes a few steps of `micro` sequences with full recomputation.

Host memory is never let run out: a try is ended when the machine's use passes `host` GiB, and `others` that other programs
may take meanwhile. `gpu` limits the GPU's memory (0: all of it); `tries=0` prints what the account says and tries nothing.
Prints a JSON line per try and a table: parameters, GiB on GPU, host and disk (said / measured), seconds a step.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from arguments import read

from meshloom.data.assignment import Share
from meshloom.data.batch import MicroBatch
from meshloom.models.config import DecoderConfig
from meshloom.models.costs import parameter_count
from meshloom.models.decoder import Decoder
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.optim.optimizers.parameters import NamedParameter, Shards
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.deepspeed.settings import DeepSpeedConfig
from meshloom.parallel.engine import EngineSettings
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh, pick_device
from meshloom.planner.built_model import model_inventory, tried_optimizer
from meshloom.planner.cost import RankCost, layout_cost
from meshloom.planner.engines import engine_cost
from meshloom.planner.memory import Job
from meshloom.planner.offload import OffloadAccount

GIB = 2**30
LEVELS: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch", "zero": 3},
    "torch-cpu": {"engine": "torch", "zero": 3, "offload": "cpu"},
    "none": {"engine": "deepspeed", "zero": 3},
    "optimizer": {"engine": "deepspeed", "zero": 3, "offload": "cpu"},
    "weights": {"engine": "deepspeed", "zero": 3, "offload": "cpu", "offload_weights": "cpu"},
    "nvme": {"engine": "deepspeed", "zero": 3, "offload": "nvme", "offload_weights": "cpu"},
    "nvme-all": {"engine": "deepspeed", "zero": 3, "offload": "nvme", "offload_weights": "nvme"},
}
PLACES = ("gpu", "host", "disk")
TAKEN = 1.5 * GIB  # of the GPU by CUDA itself, the attention's and the compiler's workspaces


@dataclasses.dataclass
class Search:
    """The levels to search and the limits of the search (GiB; `seconds` for all tries of all levels)."""

    levels: str = "torch,torch-cpu,none,optimizer,weights,nvme"
    gpu: float = 0.0
    host: float = 116.0
    others: float = 0.0
    disk: float = 0.0
    path: str = ""
    seconds: float = 240.0
    layers: int = 0
    tries: int = 9
    step: int = 1
    below: int = 1
    steps: int = 2
    micro: int = 1
    seq: int = 1024
    vocabulary: int = 32_000
    dim: int = 4096
    sub_group: int = 100_000_000
    bucket: int = 50_000_000

    def shape(self, layers: int) -> dict[str, int]:
        """Llama 8B's block, scaled by the width."""
        heads = self.dim // 128
        return {
            "dim": self.dim,
            "layers": layers,
            "heads": heads,
            "kv_heads": max(1, heads // 4),
            "ffn_dim": 7 * self.dim // 2,
            "vocabulary": self.vocabulary,
        }

    def parallel(self, level: str) -> ParallelConfig:
        """The level's engine; smaller buffers than DeepSpeed's, which are meant for many GPUs."""
        axes = dict(LEVELS[level])
        if axes["engine"] == "deepspeed":
            keys = {"sub_group_size": self.sub_group, "reduce_bucket_size": self.bucket, "stage3_max_live_parameters": 10**8}
            keys |= {"stage3_max_reuse_distance": 10**8, "stage3_prefetch_bucket_size": self.bucket}
            axes["deepspeed"] = DeepSpeedConfig(config={"zero_optimization": keys})
        if "nvme" in (axes.get("offload"), axes.get("offload_weights")):
            axes["offload_path"] = self.path
        return ParallelConfig(**axes)

    def account(self, level: str, layers: int) -> tuple[int, RankCost, OffloadAccount]:
        """Parameters of a model, and what the planner says of it."""
        with torch.device("meta"):
            model = Decoder(DecoderConfig(**self.shape(layers)))
        job = Job(self.seq, self.micro, 1, "bf16", ["full"] * layers, compiled=False)
        parallel = self.parallel(level)
        layout = Layout.plan(parallel, 1)
        inventory = model_inventory(model, parallel.tp)
        rank = layout_cost(inventory, parallel, layout, job, tried_optimizer(adamw)).ranks[0]
        return parameter_count(model.config), *engine_cost(rank, inventory, parallel, layout, job)


def adamw(parameters: Sequence[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
    """Build the optimizer that every level trains with."""
    return AdamW(AdamWConfig(lr=1e-4, weight_decay=0.1), parameters, shards)


def free_port() -> str:
    """A port for the one process to meet itself at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def used_host(process: int) -> int:
    """Bytes of host memory in use: what the machine misses, and this process's pages, whichever is more."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    missing = 1024 * (int(fields["MemTotal"].split()[0]) - int(fields["MemAvailable"].split()[0]))
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):  # it has just ended
        pages = 0
    return max(missing, pages * os.sysconf("SC_PAGESIZE"))


def attempt(search: Search, level: str, layers: int, limit: float) -> dict[str, Any]:
    """One model in a process of its own: what it measured, or why it failed. `host` is the most that was in use."""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    arguments = [f"{field.name}={getattr(search, field.name)}" for field in dataclasses.fields(search)]
    command = [sys.executable, __file__, *arguments, f"levels={level}", f"layers={layers}"]
    before, most, why, began = used_host(0), 0, "", time.monotonic()
    log = Path(f"/tmp/largest-{os.getpid()}.log")
    with log.open("w") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            most = max(most, used_host(child.pid))
            if most > (search.host + search.others) * GIB:
                why = f"host memory passed {search.host:g} GiB"
            elif time.monotonic() - began > limit:
                why = f"no end within {limit:.0f} s"
            if why:
                child.kill()
                child.wait()
            time.sleep(0.1)
    text = log.read_text()
    log.unlink()
    lines = [line for line in text.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines and not why else {}
    if not found:
        errors = [line for line in text.splitlines() if "Error" in line or "error:" in line]
        why = why or (errors[-1][:300] if errors else text[-300:])
    return {"trained": bool(found), "why": why, "host_gib": round((most - before) / GIB, 2), **found}


def train(search: Search) -> None:
    """In the child: build, take the steps, print what they took."""
    level, layers = search.levels, search.layers
    if torch.cuda.is_available() and search.gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, search.gpu * GIB / total), 0)
    began = time.perf_counter()
    parallel = search.parallel(level)
    mesh = Mesh.connect(Layout.plan(parallel, 1), pick_device())
    with torch.device("meta"):
        model = Decoder(DecoderConfig(**search.shape(layers)))
    how = EngineSettings(policies=("full",) * layers, seed=1, precision="bf16", seq_len=search.seq)
    engine = make_engine(model, mesh, adamw, parallel, how)
    ready = time.perf_counter() - began
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, search.vocabulary, (search.micro, search.seq + 1), generator=draw)
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).to(mesh.device)
    count = torch.tensor(float(search.micro * search.seq), device=mesh.device)
    seconds: list[float] = []
    losses: list[float] = []
    for _ in range(search.steps):
        start = time.perf_counter()
        loss = engine.accumulate(Share([batch], passes=1, workers=1), count)
        engine.clip(1.0, engine.gradient_norm())
        engine.update(1e-4)
        engine.zero_grad()
        losses.append(float(loss.mean))
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    swapped = sum(file.stat().st_size for file in Path(search.path).rglob("*") if file.is_file()) if search.path else 0
    on_gpu = torch.cuda.max_memory_allocated() if mesh.device.type == "cuda" else 0
    result = {
        "gpu_gib": round(on_gpu / GIB, 2),
        "disk_gib": round(swapped / GIB, 2),
        "build_seconds": round(ready, 1),
        "step_seconds": round(statistics.median(seconds[1:] or seconds), 2),
        "losses": [round(value, 4) for value in losses],
    }
    print(json.dumps(result), flush=True)
    mesh.close()


def search_level(search: Search, level: str, deadline: float) -> list[dict[str, Any]]:
    """The tries of one level."""
    gpu = search.gpu * GIB or (torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)

    def verdict(layers: int) -> tuple[str, dict[str, Any]]:
        count, cost, away = search.account(level, layers)
        said = {"level": level, "layers": layers, "billions": round(count / 1e9, 2)}
        said |= {f"said_{name}_gib": round(size / GIB, 2) for name, size in zip(PLACES, sizes(cost, away), strict=True)}
        if away.host > search.host * GIB:
            return "host", said
        if away.disk > search.disk * GIB:
            return "disk", said
        return ("gpu" if gpu and cost.total + TAKEN > gpu else ""), said

    if not gpu:
        raise SystemExit("there is no GPU here: say how much memory to reckon with, as gpu=<GiB>")
    fits = search.layers
    if not fits:
        over = 2
        while not verdict(over)[0]:
            over *= 2
        fits = max(1, bisect.bisect_left(range(over + 1), True, lo=1, key=lambda layers: bool(verdict(layers)[0])) - 1)
    rows: list[dict[str, Any]] = []
    layers = search.layers or max(1, fits - search.below * search.step)
    if not search.tries:
        rows = [{**verdict(fits)[1], "trained": False, "why": "not tried"}]
    while time.monotonic() < deadline and len(rows) < search.tries:
        refused, said = verdict(layers)
        if refused in ("host", "disk"):
            rows.append({**said, "trained": False, "why": f"the plan: it does not fit into the {refused}'s limit"})
            print(json.dumps(rows[-1]), flush=True)
            break
        rows.append({**said, **attempt(search, level, layers, deadline - time.monotonic())})
        print(json.dumps(rows[-1]), flush=True)
        if not rows[-1]["trained"]:
            break
        layers += search.step
    return rows


def sizes(cost: RankCost, away: OffloadAccount) -> tuple[int, int, int]:
    """Bytes said for the GPU, the host and the disk."""
    return cost.total, away.host, away.disk


def table(rows: list[dict[str, Any]]) -> str:
    """The largest model of each level that trained, and what stopped the next."""
    lines = [
        "| level | parameters | GPU GiB said / measured | host | disk | s a step | the next |",
        "|---|---|---|---|---|---|---|",
    ]
    for level in dict.fromkeys(row["level"] for row in rows):
        mine = [row for row in rows if row["level"] == level]
        trained = [row for row in mine if row["trained"]]
        after = next((f"{row['billions']} B: {row['why'][:60]}" for row in mine if not row["trained"]), "not tried")
        if not trained:
            said = " | ".join(f"{mine[0][f'said_{place}_gib']} / –" for place in PLACES)
            lines.append(f"| {level} | {mine[0]['billions']} B, untrained | {said} | – | {mine[0]['why'][:60]} |")
            continue
        best = trained[-1]
        pairs = " | ".join(f"{best[f'said_{place}_gib']} / {best[f'{place}_gib']}" for place in PLACES)
        lines.append(f"| {level} | {best['billions']} B | {pairs} | {best['step_seconds']} | {after} |")
    return "\n".join(lines)


def main() -> None:
    """Search, or (in a child) train one model."""
    search = read(Search(), sys.argv[1:])
    if "RANK" in os.environ:
        train(search)
        return
    if search.path:
        Path(search.path).mkdir(parents=True, exist_ok=True)
        search.disk = search.disk or (shutil.disk_usage(search.path).free / GIB - 4)
    deadline = time.monotonic() + search.seconds
    rows = [row for level in search.levels.split(",") for row in search_level(search, level, deadline)]
    print(table(rows))


if __name__ == "__main__":
    main()
