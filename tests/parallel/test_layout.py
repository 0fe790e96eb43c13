"""Layouts: arithmetic of the axes, what is refused and with which words, and that every legal layout trains the same run."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings

from meshloom.config.problems import ConfigError
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.parallel import config as parallel_config
from meshloom.parallel.capabilities import model_problems
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import EngineSettings
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import AXES, EXPERT_AXES, Layout, uses_fsdp
from meshloom.parallel.legality import Work, layout_and_model_problems, near_layouts
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline.stages import SCHEDULES, legal_micro_batches, stage_count, stage_ranks
from meshloom.parallel.policies import ActivationSettings
from support import parity
from support.ranks import run_ranks

LLAMA_1B = Work(layers=16, heads=32, kv_heads=8, ffn_dim=8192, vocabulary=128256, seq_len=8192, activation="none")
DOCUMENT = Path(__file__).parents[2] / "docs" / "parallelism.md"


@given(st.tuples(*[st.integers(1, 4) for _ in AXES]))
@settings(deadline=None)
def test_ranks_map_one_to_one_and_data_is_dealt_evenly(sizes: tuple[int, ...]) -> None:
    layout = Layout(*sizes)
    seen = [tuple(layout.coordinates(rank).values()) for rank in range(layout.world_size)]
    assert sorted(seen) == seen, "ranks count through the axes, the last one fastest"
    assert len(set(seen)) == layout.world_size
    shares = Counter(layout.data_rank(rank) for rank in range(layout.world_size))
    assert shares == dict.fromkeys(range(layout.data_size), layout.pp * layout.cp * layout.tp)


def test_tensor_ranks_are_neighbours_and_stages_far_apart() -> None:
    layout = Layout(pp=2, replicate=1, shard=2, cp=1, tp=2)
    assert [layout.coordinates(rank)["tp"] for rank in range(8)] == [0, 1] * 4
    assert [layout.coordinates(rank)["pp"] for rank in range(8)] == [0] * 4 + [1] * 4
    assert [layout.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1] * 2


@given(st.tuples(*[st.integers(1, 4) for _ in AXES]), st.integers(0, 3), st.data())
@settings(deadline=None)
def test_experts_see_the_ranks_of_a_stage_in_another_way(sizes: tuple[int, ...], zero: int, data: st.DataObject) -> None:
    pp, replicate, shard, cp, tp = sizes
    if zero == 0:
        replicate, shard = replicate * shard, 1
    within = shard * cp * tp if zero else replicate * cp * tp
    ep = data.draw(st.sampled_from([n for n in range(1, within + 1) if within % n == 0]))
    layout = Layout(pp, replicate, shard, cp, tp, zero, ep)
    seen = [tuple(layout.expert_coordinates(rank).values()) for rank in range(layout.world_size)]
    assert sorted(set(seen)) == seen and len(seen) == layout.world_size, "one to one, `ep` the fastest"
    assert layout.expert_copies * layout.expert_weights * layout.ep == layout.stage_ranks
    # Copies of an expert's part are where copies of a dense one's are, and no further apart.
    assert layout.expert_copies == (replicate if zero else layout.stage_ranks // ep)
    stage = layout.stage_ranks
    assert all(layout.expert_coordinates(rank)["pp"] == rank // stage for rank in range(layout.world_size))


def test_tensor_ranks_double_as_expert_ranks() -> None:
    layout = Layout(replicate=2, shard=2, tp=2, ep=4)
    assert [layout.expert_coordinates(rank)["ep"] for rank in range(8)] == [0, 1, 2, 3] * 2
    assert layout.describe() == "replicate 2 × shard 2 × tp 2, ZeRO-3; experts: expert_copies 2 × ep 4"
    assert Layout(shard=4, tp=2, ep=2).expert_sizes == dict(zip(EXPERT_AXES, (1, 1, 4, 2), strict=True))
    parallel = ParallelConfig(zero=3)
    whole, shared = Layout(shard=4, ep=4), Layout(shard=4, ep=2)
    assert [uses_fsdp(parallel, each, experts=True) for each in (whole, shared)] == [False, True]


@pytest.mark.parametrize(
    ("schedule", "ranks"),
    [("1f1b", [0, 1, 2, 3]), ("interleaved", [0, 1, 2, 3, 0, 1, 2, 3]), ("dualpipev", [0, 1, 2, 3, 3, 2, 1, 0])],
)
def test_stages_lie_on_ranks_in_rows_or_folded(schedule: str, ranks: list[int]) -> None:
    assert stage_ranks(ParallelConfig(pp=4, schedule=schedule)) == ranks


def test_every_schedule_of_the_config_has_properties() -> None:
    assert tuple(SCHEDULES) == parallel_config.SCHEDULES


@given(st.sampled_from([*SCHEDULES]), st.integers(2, 6), st.integers(1, 40))
@settings(deadline=None)
def test_legal_micro_batch_counts_are_those_that_torch_takes(schedule: str, pp: int, count: int) -> None:
    from support.torch_orders import torch_order

    parallel = ParallelConfig(pp=pp, schedule=schedule)
    try:
        torch_order(parallel, count)
        taken = True
    except ValueError:
        taken = False
    assert legal_micro_batches(parallel, count) == taken


def broken(world_size: int, change: dict[str, object] | None = None, **axes: object) -> tuple[ParallelConfig, Work, int]:
    """A layout and a work in which something is wrong."""
    return ParallelConfig(**axes), replace(LLAMA_1B, **(change or {})), world_size  # type: ignore[arg-type]


# Keys and number of processes → the first problem's text, as a user reads it.
BROKEN: list[tuple[tuple[ParallelConfig, Work, int], str]] = [
    (
        broken(8, tp=3),
        "parallel: pp 1 × cp 1 × tp 3 = 3 does not divide 8 processes;"
        " start 3 or 6 or 9 processes, or change parallel.pp, parallel.cp or parallel.tp",
    ),
    (
        broken(8, pp=3),
        "parallel: pp 3 × cp 1 × tp 1 = 3 does not divide 8 processes;"
        " start 3 or 6 or 9 processes, or change parallel.pp, parallel.cp or parallel.tp",
    ),
    (
        broken(8, pp=2, tp=2, cp=4),
        "parallel: pp 2 × cp 4 × tp 2 = 16 does not divide 8 processes;"
        " start 16 or 32 processes, or change parallel.pp, parallel.cp or parallel.tp",
    ),
    (
        broken(8, tp=0),
        "parallel.tp: 0 is not a size; use parallel.tp=1 to switch it off",
    ),
    (
        broken(8, pp=-1),
        "parallel.pp: -1 is not a size; use parallel.pp=1 to switch it off",
    ),
    (
        broken(8, cp=0),
        "parallel.cp: 0 is not a size; use parallel.cp=1 to switch it off",
    ),
    (
        broken(8, replicate=0),
        "parallel.replicate: 0 is not a size; use parallel.replicate=1 to switch it off",
    ),
    (
        broken(8, zero=4),
        "parallel.zero: stage 4 does not exist; use 0, 1, 2 or 3",
    ),
    (
        broken(8, replicate=3),
        "parallel.replicate: 3 groups can't share 8 data-parallel processes evenly; use one of 1, 2, 4, 8",
    ),
    (
        broken(8, zero=0, replicate=2),
        "parallel.replicate: with parallel.zero=0 every one of the 8 data-parallel processes is a replica already;"
        " leave parallel.replicate at 1, or use parallel.zero=1, 2 or 3 for hybrid sharding",
    ),
    (
        broken(8, ep=3),
        "parallel.ep: 3 does not divide the 8 ranks of a pipeline stage; use one of 1, 2, 4, 8",
    ),
    (
        broken(8, replicate=4, ep=4),
        "parallel.ep: 4 does not divide the 2 ranks of a stage that hold one copy of the weights; use one of 1, 2",
    ),
    (
        broken(8, {"experts": 6}, ep=4),
        "parallel.ep: 6 experts (model.experts.count) can't be dealt to 4 ranks evenly; use parallel.ep=1 or 2 or 3 or 6",
    ),
    (
        broken(8, ep=2),
        "parallel.ep: the model has no mixture of experts whose experts ranks could share out;"
        " use parallel.ep=1, or give model.experts.count",
    ),
    (
        broken(64, tp=64),
        "parallel.tp: 32 attention heads (model.heads) can't be dealt to 64 ranks;"
        " use parallel.tp=1 or 2 or 4 or 8 or 16 or 32",
    ),
    (
        broken(8, {"heads": 24, "kv_heads": 12}, tp=8),
        "parallel.tp: 12 key/value heads (model.kv_heads) neither divide by 8 ranks nor divide them;"
        " use parallel.tp=1 or 2 or 4",
    ),
    (
        broken(16, {"ffn_dim": 8200}, tp=16),
        "parallel.tp: model.ffn_dim=8200 can't be cut into 16 equal parts; use parallel.tp=1 or 2 or 4 or 8",
    ),
    (
        broken(8, {"vocabulary": 20}, tp=8),
        "parallel.tp: a vocabulary of 20 leaves some of 8 ranks without a row; use parallel.tp=1 or 2 or 4",
    ),
    (
        broken(8, {"seq_len": 8196}, tp=8),
        "parallel.sequence_parallel: 8196 positions per rank can't be cut into 8 equal parts;"
        " use a data.seq_len divisible by 8, or parallel.sequence_parallel=false",
    ),
    (
        broken(8, cp=2, cp_kind="star"),
        "parallel.cp_kind: there is no 'star'; use ring or ulysses",
    ),
    (
        broken(8, {"seq_len": 1001}, cp=4),
        "parallel.cp: samples of 1001 positions (data.seq_len) can't be cut into 8 equal parts;"
        " use data.seq_len=1008, or another parallel.cp",
    ),
    (
        broken(64, tp=4, cp=16, cp_kind="ulysses"),
        "parallel.cp_kind: 8 attention heads (model.heads) that parallel.tp=4 leaves on a rank can't be dealt to 16 ranks;"
        " use parallel.cp_kind=ring, or parallel.cp=1 or 2 or 4 or 8",
    ),
    (
        broken(8, pp=2, schedule="1f2b"),
        "parallel.schedule: there is no '1f2b'; did you mean 1f1b?",
    ),
    (
        broken(8, pp=2, schedule="zigzag"),
        "parallel.schedule: there is no 'zigzag'; use gpipe, 1f1b, interleaved, zb, zbv, dualpipev",
    ),
    (
        broken(8, stages_per_rank=2),
        "parallel.stages_per_rank: there are no stages with parallel.pp=1; leave it null, or set parallel.pp",
    ),
    (
        broken(8, stage_layers=[8, 8]),
        "parallel.stage_layers: there are no stages with parallel.pp=1; leave it null, or set parallel.pp",
    ),
    (
        broken(8, pp=2, stages_per_rank=2),
        "parallel.stages_per_rank: 1f1b takes exactly 1 per rank, not 2;"
        " leave it null, or use parallel.schedule=interleaved or zb",
    ),
    (
        broken(8, pp=2, schedule="zbv", stages_per_rank=4),
        "parallel.stages_per_rank: zbv takes exactly 2 per rank, not 4;"
        " leave it null, or use parallel.schedule=interleaved or zb",
    ),
    (
        broken(8, pp=2, schedule="interleaved", stages_per_rank=0),
        "parallel.stages_per_rank: interleaved takes at least 1 per rank, not 0; leave it null, or use parallel.schedule=1f1b",
    ),
    (
        broken(8, pp=2, schedule="interleaved", stages_per_rank=1),
        "parallel.stages_per_rank: one stage per rank has nothing to interleave; use parallel.schedule=1f1b",
    ),
    (
        broken(32, pp=32),
        "parallel.pp: 16 layers (model.layers) can't fill 32 stages of 1f1b; use parallel.pp=16 or less",
    ),
    (
        broken(8, pp=4, schedule="interleaved", stages_per_rank=8),
        "parallel.pp: 16 layers (model.layers) can't fill 32 stages of interleaved; use parallel.pp=2 or less",
    ),
    (
        broken(8, pp=4, stage_layers=[4, 4, 8]),
        "parallel.stage_layers: names 3 stages, but 1f1b on 4 ranks has 4; give 4 numbers, or null to balance them by cost",
    ),
    (
        broken(8, pp=4, stage_layers=[8, 8, 0, 0]),
        "parallel.stage_layers: [8, 8, 0, 0] leaves a stage without a layer; give every stage 1 or more",
    ),
    (
        broken(8, pp=4, stage_layers=[4, 4, 4, 8]),
        "parallel.stage_layers: [4, 4, 4, 8] adds up to 20 layers, but model.layers=16;"
        " make them add up, or null to balance them by cost",
    ),
    (
        broken(8, {"compile": True}, pp=2, schedule="zb"),
        "trainer.compile: zb runs the backward pass in two halves, and compiled blocks can't;"
        " set it to false, or use parallel.schedule=1f1b or interleaved",
    ),
    (
        broken(8, {"activation": "selective"}, pp=2, schedule="zbv"),
        "trainer.activation: zbv runs the backward pass in two halves, and selective checkpointing allows one;"
        " use none, full or offload, or use parallel.schedule=1f1b or interleaved",
    ),
]


def changed(parallel: ParallelConfig, words: str) -> ParallelConfig:
    """The config with overrides, as `near_layouts` writes them."""
    settings = dict(word.removeprefix("parallel.").split("=") for word in words.split())
    read = {"null": None, "true": True, "false": False}
    return replace(parallel, **{key: read[v] if v in read else int(v) if v.isdigit() else v for key, v in settings.items()})


def test_broken_layouts_are_refused_with_reason_and_fix() -> None:
    for question, expected in BROKEN:
        problems = layout_and_model_problems(*question)
        assert str(problems[0]) == expected, question
        parallel, work, world_size = question
        for words in near_layouts(parallel, work, world_size):
            assert not layout_and_model_problems(changed(parallel, words), work, world_size), words
        assert near_layouts(*question), "there always is a layout for this model"


def as_asked(question: tuple[ParallelConfig, Work, int]) -> str:
    """A broken layout as its overrides on the command line, for the document."""
    parallel, work, world_size = question
    keys = {"layers": "model.", "heads": "model.", "kv_heads": "model.", "ffn_dim": "model.", "vocabulary": "model."}
    keys |= {"seq_len": "data.", "activation": "trainer.", "compile": "trainer."}
    changes = [f"launch.nproc={world_size}"]
    for prefix, now, plain in ((None, parallel, ParallelConfig()), (keys, work, LLAMA_1B)):
        for field in dataclasses.fields(now):
            value = getattr(now, field.name)
            if field.name == "experts" and value:
                changes.append(f"model.experts.count={value}")
            elif value != getattr(plain, field.name):
                place = prefix[field.name] if prefix else "parallel."
                changes.append(f"{place}{field.name}={str(value).replace(' ', '') if not isinstance(value, bool) else 'true'}")
    return " ".join(changes)


def table() -> str:
    """The table of docs/parallelism.md; `python tests/parallel/test_layout.py` prints it."""
    rows = [f"| `{as_asked(question)}` | {message} |" for question, message in BROKEN]
    return "\n".join(["| Asked for, on Llama 1B | Refused with |", "|---|---|", *rows])


def test_docs_list_broken_layouts_with_their_messages() -> None:
    assert len(BROKEN) >= 25
    assert table() in DOCUMENT.read_text()


@given(
    st.sampled_from([1, 2, 3, 4, 6, 8, 16, 24]),
    st.fixed_dictionaries(
        {
            "tp": st.integers(0, 9),
            "pp": st.integers(0, 9),
            "cp": st.integers(0, 5),
            "replicate": st.integers(0, 4),
            "ep": st.sampled_from([1, 1, 1, 0, 2, 3, 4]),
            "zero": st.integers(-1, 4),
            "schedule": st.sampled_from([*SCHEDULES, "other"]),
            "cp_kind": st.sampled_from(["ring", "ulysses", "other"]),
            "stages_per_rank": st.none() | st.integers(0, 4),
            "stage_layers": st.none() | st.lists(st.integers(0, 9), max_size=9),
            "sequence_parallel": st.booleans(),
        }
    ),
)
@settings(max_examples=150, deadline=None)
def test_any_layout_is_legal_or_refused_with_legal_neighbours(world_size: int, axes: dict[str, Any]) -> None:
    parallel, work = ParallelConfig(**axes), replace(LLAMA_1B, experts=12)
    problems = layout_and_model_problems(parallel, work, world_size)
    if not problems:
        layout = Layout.plan(parallel, world_size)
        assert layout.world_size == world_size
        assert len(stage_ranks(parallel)) == stage_count(parallel) <= work.layers
        return
    assert all(problem.key and problem.message and problem.fix for problem in problems)
    for words in near_layouts(parallel, work, world_size):
        assert not layout_and_model_problems(changed(parallel, words), work, world_size), words


class Wider(Decoder):
    """A decoder with one part that has no role."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.adapter = torch.nn.Linear(4, 4)


class Frozen(Decoder):
    """A decoder that means to keep its embedding and norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        assert self.embed is not None and self.norm is not None
        self.embed.requires_grad_(False)
        self.norm.requires_grad_(False)


def test_a_model_with_frozen_weights_is_refused_by_their_names() -> None:
    (problem,) = model_problems(Frozen(DecoderConfig(**parity.Work().llama())), ParallelConfig(), ActivationSettings())
    assert problem.key == "model" and "embed.weight and 1 more" in problem.message and "lr_scale" in problem.fix


class Kept(Decoder):
    """Make what is said instead: a decoder whose embedding has no rate."""

    def lr_scale(self, name: str) -> float:
        return 0.0 if name == "embed.weight" else super().lr_scale(name)


def trained_beside(rank: int, world_size: int) -> set[str]:
    """Names of the weights that two steps leave as they were."""
    work = parity.Work(ParallelConfig(zero=0))
    mesh = Mesh.connect(Layout.plan(work.parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = Kept(DecoderConfig(**work.llama()))
    engine = make_engine(
        model, mesh, functools.partial(AdamW, AdamWConfig(weight_decay=0.1)), work.parallel, EngineSettings(precision="fp64")
    )
    before = {f.name: f.tensor.clone() for f in engine.fragments() if f.role == "weight"}
    for number in range(2):
        parity.step(engine, work, number)
    return {f.name for f in engine.fragments() if f.role == "weight" and torch.equal(before[f.name], f.tensor)}


def test_a_weight_without_a_rate_stays_as_it_is() -> None:
    assert run_ranks(1, trained_beside) == [{"embed.weight"}]


def test_a_module_without_a_role_is_refused_by_name() -> None:
    config = DecoderConfig(**parity.Work().llama())
    wider, plain = Wider(config), ActivationSettings()
    assert model_problems(Decoder(config), ParallelConfig(tp=2), plain) == []
    assert model_problems(wider, ParallelConfig(pp=2), plain) == []
    (cut,) = model_problems(wider, ParallelConfig(tp=2), plain)
    assert cut.key == "parallel.tp" and "adapter" in cut.message


def test_a_layout_that_does_not_fit_raises_with_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        Layout.plan(ParallelConfig(tp=0, zero=7), 4)
    assert [problem.key for problem in caught.value.problems] == ["parallel.tp", "parallel.zero"]


@st.composite
def small_works(draw: st.DrawFn) -> parity.Work:
    """Some work in a legal layout on four processes."""
    tp, pp, cp = (draw(st.sampled_from([1, 2, 4])) for _ in range(3))
    ep = draw(st.sampled_from([1, 2, 4]))
    # Data parallelism alone is in the parity table; it also is what is drawn first, always.
    assume(4 % (tp * pp * cp) == 0 and max(tp, pp, cp) > 1)
    data = 4 // (tp * pp * cp)
    parallel = ParallelConfig(
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        zero=draw(st.integers(0, 3)),
        replicate=draw(st.sampled_from([n for n in (1, 2, 4) if data % n == 0])),
        schedule=draw(st.sampled_from([*SCHEDULES])),
        cp_kind=draw(st.sampled_from(["ring", "ulysses"])),
        sequence_parallel=draw(st.booleans()),
    )
    model: dict[str, Any] = {"layers": 8, "kv_heads": draw(st.sampled_from([1, 4])), "tied": draw(st.booleans())}
    if ep > 1:
        model["experts"] = {"count": 4, "top_k": 2, "ffn_dim": 5}
    activation = draw(st.sampled_from(["none", "none", "selective", "full"]))
    work = parity.Work(
        parallel,
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from([5, 8])),
        steps=2,
        documents=True,
        activation=activation,
        model=tuple(model.items()),
    )
    shape = work.llama()
    sizes = {key: shape[key] for key in ("layers", "heads", "kv_heads", "ffn_dim", "vocabulary")}
    asked = Work(**sizes, seq_len=parity.SEQ_LEN, activation=activation, experts=4 if ep > 1 else 0)
    assume(not layout_and_model_problems(parallel, asked, 4))
    return work


@given(st.lists(small_works(), min_size=3, max_size=3))
@settings(max_examples=1, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_random_legal_layouts_train_the_same_run(works: list[parity.Work]) -> None:
    """Others every time."""
    for work, found in zip(works, parity.differences(4, works), strict=True):
        assert found.worst < 1e-9, (work, found)


if __name__ == "__main__":
    print(table())
