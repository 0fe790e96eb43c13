"""The promise, as a table: every layout gives the losses, norms and gradients of a bare PyTorch loop in one process.

In float64, over four steps (two for variants) with clipping, gradients parameter by parameter on the first of them. Two steps
and the evaluation after them hold the optimizer's state, too: the second update is made from that of the first.
`python tests/test_parity.py` prints the table of docs/measurements/parity.md.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from meshloom.parallel.config import CONTEXT_KINDS, ParallelConfig
from meshloom.parallel.pipeline.stages import SCHEDULES
from support.parity import Difference, Work, differences

TOLERANCE = 1e-9
STEPS, FEW = 4, 2  # few: of what differs from another row in one thing only
DOCUMENT = Path(__file__).parent.parent / "docs" / "measurements" / "parity.md"


def work(micro: int = 1, steps: int = STEPS, **settings: Any) -> Work:
    """Make a `Work`. A key neither of `parallel` nor of `Work` changes the model.

    No size divides by the numbers of ranks: shards are uneven. The rate keeps deep models from amplifying the last bit.
    """
    axes, fields = ParallelConfig.__dataclass_fields__, Work.__dataclass_fields__
    parallel = ParallelConfig(**{key: value for key, value in settings.items() if key in axes})
    model = {"layers": 4} if parallel.pp > 1 else {}
    model |= {key: value for key, value in settings.items() if key not in axes and key not in fields}
    of_work = {key: value for key, value in settings.items() if key in fields}
    return Work(parallel, micro, steps=steps, lr=2e-3, model=tuple(model.items()), **of_work)


def rank_pair(**settings: Any) -> Work:
    """Make a variant of a pipeline on two ranks."""
    return work(steps=FEW, samples=4, pp=2, **settings)


MUP = {"mup_base": 12, "mup_embedding": 12.0, "mup_residual": 0.22}
TIED = {"tied": True}
YARN = {"kind": "yarn", "factor": 4.0, "original_positions": 8, "beta_fast": 3.0}
PARTS: dict[str, dict[str, Any]] = {
    "norm of each head, biases of q, k, v": {"qk_norm": "head", "head_dim": 8, "qkv_bias": True},
    "norms after, norm of all heads, yarn": {"norm_place": "after", "qk_norm": "full", "rope_scaling": YARN},
    "norms around, 1 + weight, GeGLU, soft-cap, z-loss": {
        **{"norm_place": "around", "norm": "rms_plus_one", "ffn_activation": "gelu_tanh", "logit_softcap": 3.0},
        **{"embedding_scale": 4.9, "z_loss": 0.1, "tied": True},
    },
    "latent attention": {
        **{"attention": "mla", "kv_heads": 4, "rope_interleaved": True},
        "mla": {"q_lora_rank": 10, "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
    },
    "windows by kind of layer": {
        **{"layer_types": ["sliding", "full"], "sliding_window": 5, "rope_theta_sliding": 1e4},
        **{"norm_place": "around", "qk_norm": "head", "norm": "rms_plus_one"},
    },
    "windows, sinks, soft-cap of scores": {
        **{"layer_types": ["sliding", "full"], "sliding_window": 7, "sinks": True, "attention_softcap": 2.0},
        **{"attention_scale": 0.7},
    },
    "layers without positions, output biases, interleaved part": {
        **{"layer_types": ["full", "nope"], "output_bias": True, "ffn_bias": True},
        **{"rope_fraction": 0.67, "rope_interleaved": True},
    },
}
"""Parts of a decoder that Llama does not have."""
SINKS = PARTS["windows, sinks, soft-cap of scores"]
TABLE: dict[str, tuple[int, Work]] = {
    # data parallelism
    "one process": (1, work(zero=0)),
    "one process, 3 micro-batches": (1, work(3, zero=1)),
    "one process, one micro-batch": (1, work(8, zero=2)),
    **{f"ZeRO-{zero}, 4 micro-batches": (2, work(steps=FEW, zero=zero)) for zero in range(4)},
    **{f"ZeRO-{zero}": (4, work(zero=zero)) for zero in range(4)},
    **{f"HSDP, ZeRO-{zero}": (4, work(zero=zero, replicate=2)) for zero in (1, 2, 3)},
    "ZeRO-3, tied head": (2, work(2, FEW, **TIED)),
    "ZeRO-2, documents": (2, work(2, FEW, zero=2, documents=True)),
    **{f"ZeRO-3, activation={policy}": (2, work(2, FEW, activation=policy)) for policy in ("full", "selective", "offload")},
    "ZeRO-3, muP": (2, work(2, FEW, **MUP)),
    # tensor parallelism: 3 sequences are cut inside, 2 or 4 between sequences, so most rows do both (5 samples are 3 and 2)
    "tp 2": (2, work(3, tp=2)),
    "tp 2, cut between sequences": (2, work(4, FEW, tp=2)),
    "tp 2, whole stream": (2, work(4, FEW, tp=2, sequence_parallel=False)),
    "tp 2, tied head, muP": (2, work(3, FEW, samples=5, tp=2, **TIED, **MUP)),
    "tp 2, documents, activation=selective": (2, work(3, FEW, samples=5, tp=2, documents=True, activation="selective")),
    "tp 4, 2 key/value heads": (4, work(3, FEW, samples=5, tp=4)),
    "tp 2 × ZeRO-0": (4, work(3, FEW, tp=2, zero=0)),
    "tp 2 × ZeRO-1, cut between sequences": (4, work(2, FEW, tp=2, zero=1)),
    "tp 2 × ZeRO-2, whole stream, 1 key/value head": (4, work(3, FEW, tp=2, zero=2, sequence_parallel=False, kv_heads=1)),
    "tp 2 × ZeRO-3": (4, work(3, tp=2)),
    "tp 2 × ZeRO-3, tied head, muP, 1 key/value head": (4, work(3, FEW, tp=2, kv_heads=1, **TIED, **MUP)),
    # pipelines: on two ranks, 4 micro-batches are enough for every phase of a schedule
    **{f"pp 2, {schedule}": (2, work(steps=FEW, pp=2, schedule=schedule, zero=0)) for schedule in SCHEDULES},
    "pp 2, interleaved, 4 stages per rank": (2, rank_pair(schedule="interleaved", layers=8, stages_per_rank=4)),
    "pp 2, zb, 4 stages per rank": (2, rank_pair(schedule="zb", layers=8, stages_per_rank=4)),
    "pp 2, zb, 1 stage per rank": (2, rank_pair(schedule="zb", stages_per_rank=1)),
    "pp 2, stages by hand": (2, rank_pair(layers=5, stage_layers=[1, 4])),
    "pp 2, micro-batches of 2": (2, work(2, FEW, pp=2)),
    "pp 2, interleaved, 3 micro-batches": (2, work(steps=FEW, pp=2, schedule="interleaved", samples=3)),
    "pp 2, zbv, 2 micro-batches": (2, work(steps=FEW, pp=2, schedule="zbv", samples=2)),
    "pp 2, 1f1b, documents": (2, rank_pair(documents=True)),
    "pp 2, zbv, documents": (2, rank_pair(schedule="zbv", documents=True)),
    **{
        f"pp 2, {schedule}, activation={policy}": (2, rank_pair(schedule=schedule, activation=policy))
        for schedule, policies in (("interleaved", ("selective", "full", "offload")), ("zb", ("full", "offload")))
        for policy in policies
    },
    **{f"pp 2, {schedule} × ZeRO-3": (4, work(steps=FEW, pp=2, schedule=schedule)) for schedule in SCHEDULES},
    **{f"pp 2, 1f1b × ZeRO-{zero}": (4, work(steps=FEW, pp=2, zero=zero)) for zero in (0, 1, 2)},
    **{
        f"pp 4, {schedule}, tied head": (4, work(steps=FEW, pp=4, schedule=schedule, layers=layers, **TIED))
        for schedule, layers in (("1f1b", 4), ("interleaved", 8), ("zb", 8), ("zbv", 8), ("dualpipev", 8))
    },
    # context parallelism
    **{
        f"cp 2, {kind} × ZeRO-{zero}{', documents' * packed}": (
            2,
            work(2, FEW, cp=2, cp_kind=kind, zero=zero, documents=packed),
        )
        for kind, zero, packed in (
            *(("ring", 0, False), ("ring", 1, True), ("ring", 2, False), ("ring", 3, True)),
            *(("ulysses", 0, True), ("ulysses", 3, False)),
        )
    },
    **{
        f"cp 2, ring, documents, activation={policy}": (2, work(4, FEW, cp=2, documents=True, activation=policy))
        for policy in ("selective", "full", "offload")
    },
    "cp 2, ring × HSDP": (4, work(4, FEW, cp=2, replicate=2)),
    **{f"cp 4, {kind}, documents": (4, work(4, FEW, cp=4, cp_kind=kind, documents=True)) for kind in CONTEXT_KINDS},
    "cp 2, ring, queries × ZeRO-1": (2, work(4, FEW, cp=2, zero=1, ring_exchange="queries", kv_heads=4)),
    "cp 4, ring, queries, documents, windows, activation=selective": (
        4,
        work(2, FEW, cp=4, documents=True, ring_exchange="queries", activation="selective", **SINKS),
    ),
    "cp 4, ring, documents, keys handed on": (4, work(2, FEW, cp=4, documents=True, ring_direct=1, activation="full")),
    # several at once
    **{
        f"cp 2, {kind} × tp 2, documents": (4, work(4, FEW, cp=2, cp_kind=kind, tp=2, documents=True)) for kind in CONTEXT_KINDS
    },
    "cp 2, ring × tp 2, whole stream": (4, work(4, FEW, cp=2, tp=2, zero=1, sequence_parallel=False)),
    **{
        f"pp 2 × cp 2, {kind}, documents": (4, work(2, FEW, pp=2, cp=2, cp_kind=kind, zero=2, documents=True))
        for kind in CONTEXT_KINDS
    },
    "pp 2 × tp 2, interleaved, tied head": (4, work(2, FEW, pp=2, tp=2, schedule="interleaved", **TIED)),
    "pp 2 × tp 2 × ZeRO-2": (8, work(2, FEW, pp=2, tp=2, zero=2, layers=2)),
    "pp 2 × tp 2 × ZeRO-3, zbv, tied head, documents": (8, work(steps=FEW, pp=2, tp=2, schedule="zbv", documents=True, **TIED)),
    "HSDP × tp 2": (8, work(2, FEW, tp=2, zero=2, replicate=2)),
    "HSDP × pp 2, zb": (8, work(steps=FEW, pp=2, schedule="zb", zero=1, replicate=2)),
    "pp 2 × cp 2, ring × tp 2, zb, documents": (8, work(2, FEW, pp=2, cp=2, tp=2, zero=1, schedule="zb", documents=True)),
    # parts of other families
    **{f"ZeRO-3, {name}": (2, work(2, FEW, **parts)) for name, parts in PARTS.items()},
    **{f"tp 2, {name}": (2, work(3, FEW, samples=5, tp=2, **parts)) for name, parts in PARTS.items()},
    **{
        f"tp 2, whole stream, {name}": (2, work(4, FEW, tp=2, sequence_parallel=False, **parts))
        for name, parts in PARTS.items()
    },
    **{  # what tells heads apart, where ranks share key/value heads
        f"tp 4, {name}": (4, work(3, FEW, samples=5, tp=4, **PARTS[name]))
        for name in (
            *("norm of each head, biases of q, k, v", "norms after, norm of all heads, yarn"),
            "windows, sinks, soft-cap of scores",
        )
    },
    **{
        f"tp 2, activation=selective, {name}": (2, work(3, FEW, samples=5, tp=2, activation="selective", **PARTS[name]))
        for name in ("latent attention", "windows, sinks, soft-cap of scores", "norms after, norm of all heads, yarn")
    },
    **{f"pp 2, zbv, {name}": (2, rank_pair(schedule="zbv", **parts)) for name, parts in PARTS.items()},
    **{f"cp 2, ring, documents, {name}": (2, work(4, FEW, cp=2, documents=True, **parts)) for name, parts in PARTS.items()},
    # batches that don't divide: 7 samples, so that ranks, micro-batches and passes are filled with blanks
    "one process, 7 samples in micro-batches of 2": (1, work(2, FEW, zero=0, samples=7)),
    **{f"ZeRO-{zero}, 7 samples on 3": (3, work(2, FEW, zero=zero, samples=7)) for zero in range(4)},
    **{f"ZeRO-{zero}, 3 samples on 4": (4, work(1, FEW, zero=zero, samples=3)) for zero in range(4)},
    "HSDP, ZeRO-3, 7 samples": (4, work(2, FEW, replicate=2, samples=7)),
    **{f"pp 2, {schedule}, 7 samples": (2, work(4, FEW, pp=2, schedule=schedule, samples=7)) for schedule in ("1f1b", "zbv")},
    "pp 2 × ZeRO-1, interleaved, 7 samples": (4, work(1, FEW, pp=2, zero=1, schedule="interleaved", samples=7)),
    "pp 4, dualpipev, 7 samples": (4, work(2, FEW, pp=4, schedule="dualpipev", layers=8, samples=7)),
    "tp 2 × ZeRO-1, 7 samples": (4, work(2, FEW, tp=2, zero=1, samples=7)),
    "cp 2, ring × ZeRO-3, 7 samples, documents": (4, work(2, FEW, cp=2, samples=7, documents=True)),
}


SHARE = 10  # rows that share their processes


@cache
def found(ranks: int, part: int) -> dict[str, Difference] | AssertionError:
    """Some rows on this many processes; or what one of them failed with."""
    rows = [name for name, (size, _) in TABLE.items() if size == ranks][part * SHARE :][:SHARE]
    try:
        return dict(zip(rows, differences(ranks, [TABLE[name][1] for name in rows], timeout=200.0), strict=True))
    except AssertionError as failure:
        return failure


def difference(name: str) -> Difference:
    """Of a row; measured with those around it."""
    ranks = TABLE[name][0]
    place = [other for other, (size, _) in TABLE.items() if size == ranks].index(name)
    rows = found(ranks, place // SHARE)
    if isinstance(rows, AssertionError):
        raise rows
    return rows[name]


@pytest.mark.parametrize("name", [pytest.param(name, id=f"p{ranks}: {name}") for name, (ranks, _) in TABLE.items()])
def test_losses_norms_and_gradients_are_those_of_a_bare_loop(name: str) -> None:
    got = difference(name)
    assert got.worst < TOLERANCE, got


def test_the_document_has_every_row() -> None:
    text = DOCUMENT.read_text()
    missing = [name for name, (ranks, case) in TABLE.items() if f"| {name} | {ranks} | {case.steps} |" not in text]
    assert missing == [], "python tests/test_parity.py prints the table"


def table() -> str:
    """The table of docs/measurements/parity.md."""
    rows = ["| Layout | Processes | Steps | Loss | Norm | Gradient |", "|---|---|---|---|---|---|"]
    for name, (ranks, case) in TABLE.items():
        got = difference(name)
        rows.append(f"| {name} | {ranks} | {case.steps} | {got.loss:.0e} | {got.norm:.0e} | {got.gradient:.0e} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
