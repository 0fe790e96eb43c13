"""Balance over sequences, micro-batches, a prefix, the batch and past batches on real text of four domains.

    python benchmarks/balance_domains.py --output outputs/domains
    python benchmarks/balance_domains.py --output outputs/domains --runs past,sequence,past:2,sequence:2
    python benchmarks/balance_domains.py --size gpu --processes 8 --steps 400 --runs past,micro,past:2,micro:2,exact,prefix

The domains are found on the machine: Python source of the standard library, English manual pages, C headers, and JSON. All runs
have the same data, cut and initial weights; they differ in the shares that the balance loss charges. A run written `past:2` has
seed 2. Written to the output folder: the texts, the runs, and table.md. Runs that are there are not run again.

On a GPU several processes share it: a model of this size leaves it idle most of the time. Texts that an earlier call has
gathered, on another machine perhaps, are used as they are.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import statistics
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from many_runs import FINISHED, run_all

BYTES = 4_000_000  # of each domain
LONGEST = 100_000  # bytes of a file that are taken

PACKAGES = sysconfig.get_paths()["purelib"]
DOMAINS: dict[str, list[tuple[str, str]]] = {
    "python": [(sysconfig.get_paths()["stdlib"], "*.py")],
    "english": [("/usr/share/man", f"man{section}/*.gz") for section in range(1, 9)],
    "c_headers": [("/usr/include", "**/*.h"), (sysconfig.get_paths()["include"], "**/*.h"), (PACKAGES, "**/*.h")],
    "json": [("/usr/share", "**/*.json"), ("/usr/lib", "**/*.json"), (PACKAGES, "**/*.json")],
}
"""Domain → folders and patterns of its files."""

RUNS = "past,sequence,micro,past:2,sequence:2,exact,prefix,past:3,sequence:3"
COEFFICIENT = 0.01
BALANCE = {
    "sequence": ["balance.global_batch=0", f"balance.sequence={COEFFICIENT}"],
    "micro": ["balance.global_batch=0", f"balance.micro_batch={COEFFICIENT}"],
    **{name: [f"balance.global_batch={COEFFICIENT}", f"balance.counts={name}"] for name in ("prefix", "exact", "past")},
}
"""Run → its keys. `sequence` is what micro-batches of one sequence each would be charged, and faster to run."""

SIZES = {
    "cpu": (
        *("data.seq_len=256", "data.vocabulary=1024", "batch.samples=16", "batch.micro=4"),
        *("model.dim=64", "model.layers=4", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=192", "optim.lr=4e-3"),
        *("model.experts.count=16", "model.experts.top_k=2", "model.experts.ffn_dim=64", "trainer.eval_samples=256"),
    ),
    "gpu": (
        *("data.seq_len=512", "data.vocabulary=4096", "batch.samples=32", "batch.micro=4", "precision=bf16"),
        *("model.dim=256", "model.layers=8", "model.heads=4", "model.kv_heads=2", "model.ffn_dim=512", "optim.lr=2e-3"),
        *("model.experts.count=32", "model.experts.top_k=4", "model.experts.ffn_dim=128", "trainer.eval_samples=512"),
    ),
}
"""Name → keys of the model and of a step."""

COMMON = (
    *("recipe=moe_tiny", "data=domains", "resume=none", "trainer.sample_prompt=null", "checkpoint.every=0"),
    *("logging.progress=false", "model.experts.shared=0", "trainer.eval_every=25%", "launch.nproc=1"),
)


def gather(folder: Path) -> None:
    """Copy each domain's files, in an order that says nothing of their contents, until there are enough bytes."""
    for domain, places in DOMAINS.items():
        target = folder / domain
        if target.exists():
            continue
        found = {path for root, pattern in places for path in Path(root).glob(pattern) if path.is_file()}
        draft, size, seen = folder / f"{domain}.draft", 0, set[bytes]()
        draft.mkdir(parents=True, exist_ok=True)
        for path in sorted(found, key=lambda path: hashlib.sha256(path.name.encode()).digest()):
            text = _text(path)
            digest = hashlib.sha256(text).digest()
            if digest in seen:
                continue
            seen.add(digest)
            (draft / f"{len(seen)}.txt").write_bytes(text)
            size += len(text)
            if size >= BYTES:
                break
        print(f"{domain}: {size / 1e6:.1f} MB in {len(seen)} files", flush=True)
        draft.rename(target)


def _text(path: Path) -> bytes:
    """Return the beginning of a file, as UTF-8."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data[:LONGEST].decode(errors="ignore").encode()


def write_recipe(folder: Path, texts: Path) -> None:
    """Write the data recipe: all domains in equal shares."""
    lines = [
        "defaults:",
        "  - base_mixture",
        *(f"  - /data@sources.{name}: text" for name in DOMAINS),
        "  - _self_",
        "sources:",
    ]
    lines += [f"  {name}: {{input: {texts.resolve() / name}, markup: true, validation: 0.04}}" for name in DOMAINS]
    lines += ["weights:", *(f"  {name}: 1" for name in DOMAINS)]
    path = folder / "data" / "domains.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def command_line(name: str, steps: int, size: str, folder: Path) -> list[str]:
    """Return the arguments of `meshloom train` for the run of this name."""
    kind, _, seed = name.partition(":")
    fixed = [f"trainer.steps={steps}", f"seed={seed or 1}", f"output_dir={folder / 'runs' / name.replace(':', '-seed-')}"]
    return ["--config-dir", str((folder / "config").resolve()), *COMMON, *SIZES[size], *BALANCE[kind], *fixed]


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(runs: dict[str, Path]) -> str:
    """Write a Markdown table: final validation loss, its domains, specialisation, and the load of the busiest expert.

    Specialisation is the mutual information of domain and expert, a mean over layers; the load one over the last 50 steps.
    """
    lines = [f"| Run | Loss | {' | '.join(DOMAINS)} | Specialisation, nats | Busiest expert |"]
    lines.append("|---" * (4 + len(DOMAINS)) + "|")
    for name, run in runs.items():
        rows = rows_of(run)
        last = [row for row in rows if "eval_loss" in row][-1]
        steps = [row for row in rows if "loss" in row][-50:]
        busiest = _mean(value for row in steps for key, value in row.items() if key.endswith("/load_max"))
        domains = " | ".join(f"{last[f'validation/{domain}/loss']:.4f}" for domain in DOMAINS)
        information = _mean(value for key, value in last.items() if key.endswith("/information"))
        lines.append(f"| {name} | {last['eval_loss']:.4f} | {domains} | {information:.3f} | {busiest:.2f} |")
    return "\n".join(lines) + "\n"


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(list(values))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and tabulate what has finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/domains"))
    parser.add_argument("--runs", default=RUNS, help="separated by commas")
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="that share the runs, side by side")
    parser.add_argument("--seconds", type=float, default=None, help="what is still running then is ended")
    parser.add_argument("--tabulate", action="store_true", help="run nothing")
    given = parser.parse_args(arguments)
    names = given.runs.split(",")
    gather(given.output / "texts")
    write_recipe(given.output / "config", given.output / "texts")
    lines = [command_line(name, given.steps, given.size, given.output) for name in names]
    if not given.tabulate:
        run_all([lines[at :: given.processes] for at in range(given.processes)], given.output, given.seconds)
    folders = {name: given.output / "runs" / name.replace(":", "-seed-") for name in names}
    finished = {name: folder for name, folder in folders.items() if (folder / FINISHED).exists()}
    (given.output / "table.md").write_text(table(finished))
    print(table(finished))


if __name__ == "__main__":
    main()
