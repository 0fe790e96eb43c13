"""`meshloom plan` from the command line: its tables, its refusals, its drawing. No process group is ever made."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch.distributed as dist

from meshloom.launch.cli import main
from meshloom.launch.plan_cluster import predict
from meshloom.launch.planning import checked_plan, make_plan, plan_of, resolve_plan, spared_by_fusing
from meshloom.parallel.layout import Layout
from meshloom.planner.cluster import load_cluster
from meshloom.planner.drawing import pipeline_svg
from meshloom.planner.tables import axis_groups, written_ranks
from support.plans import SMALL

LLAMA = ["recipe=llama_1b", "batch.samples=64"]  # ZeRO-1


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    printed = capsys.readouterr()
    assert not dist.is_initialized()
    return code, printed.out, printed.err


def test_says_who_holds_what_and_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = planned(capsys, *LLAMA, "launch.nproc=8", "parallel.tp=2", "parallel.pp=2", "parallel.zero=3")
    assert code == 0
    assert "8 processes: pp 2 × shard 2 × tp 2, ZeRO-3" in out
    assert "0, 4 | 1, 5 | 2, 6 | … 4 groups" in out
    assert "embedding, layers 0–9" in out and "layers 10–15, norm and head" in out
    assert "64 samples × 8,192 positions = 524,288 tokens" in out
    assert "through a pipeline ZeRO-2 needs what ZeRO-1 needs" in out


def test_says_what_is_blank(capsys: pytest.CaptureFixture[str]) -> None:
    """Nine micro-batches of four on four stages, where `interleaved` runs 8 or 10 of them."""
    pipeline = ["launch.nproc=4", "parallel.pp=4", "parallel.schedule=interleaved", "batch.samples=36"]
    _, out, _ = planned(capsys, "recipe=llama_1b", "batch.micro=4", *pipeline)
    assert "10 micro-batches of 4 samples" in out
    assert "10% of the rows of a step are blank" in out and "batches of 32 or 40 samples have no blanks" in " ".join(
        out.split()
    )
    _, out, _ = planned(capsys, *LLAMA, "launch.nproc=8")
    assert "blank" not in out


def test_says_what_an_exchange_between_islands_needs() -> None:
    """The differences, and a buffer for them, of a quarter of the weights; with a delay the differences are kept anyway."""
    words = [*LLAMA, "launch.nproc=8", "optim.local.islands=2"]
    bytes_of_both = 8 * 1_498_482_688 / 4  # 2.79 GiB
    for gib, more in ((bytes_of_both / 2**30, []), (bytes_of_both / 2**31, ["optim.local.delay=100"])):
        (note,) = [each for each in make_plan([*words, *more]).notes if "an exchange takes" in each]
        assert f"{gib:.3g} GiB more on a rank (of all weights" in note
    (note,) = [each for each in make_plan([*words, "optim.local.fragments=2"]).notes if "an exchange takes" in each]
    odd_layers_and_the_rest = 8 * (8 * 60_821_504 + 2 * 128_256 * 2048 + 2048) / 4  # of 16 layers
    assert f"{odd_layers_and_the_rest / 2**30:.3g} GiB more on a rank (for its largest fragment" in note


def test_a_plan_of_islands_counts_the_processes_of_all() -> None:
    """Alone on its GPU an island takes the step of one GPU on its part of the batch, so speed and cost are those of one."""
    cluster = load_cluster(["cluster=h100x8"])
    words = [*SMALL, "batch.micro=4", "trainer.activation=none", "checkpoint.folder=/nowhere", "trainer.steps=10"]
    runs = (
        ["launch.nproc=8", "batch.samples=128", "optim.local.islands=8"],
        ["launch.nproc=1", "batch.samples=16", "trainer.steps=80"],
    )
    (islands, found), (_, alone) = (
        (plan, predict(plan, resolved.config, cluster))
        for resolved in (resolve_plan([*words, *run], cluster=cluster) for run in runs)
        for plan in [plan_of(resolved.config, ())]
    )
    assert (islands.processes, islands.islands, islands.layout.world_size, found.gpus) == (8, 8, 1, 8)
    for name in ("seconds", "tokens_per_second", "mfu", "gpu_hours", "cost"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name), rel=1e-6), name
    assert 0.3 < found.mfu < 1 and found.days == pytest.approx(alone.days / 8, rel=1e-6)
    ((rank,), saved) = islands.cost.ranks, islands.needs.step
    assert saved == (8 * 12 + 8) * rank.elements, "weights and moments of each island, outer weights and their momentum once"


def test_figures_are_those_of_arithmetic() -> None:
    plan = make_plan([*LLAMA, "launch.nproc=8", "parallel.zero=1"])
    parameters = 1_498_482_688
    (rank,) = plan.cost.ranks
    assert rank.elements == pytest.approx(parameters / 8, rel=1e-3)
    assert rank.weights == rank.elements * 4 and rank.optimizer == rank.elements * 8
    assert rank.gathered == parameters * 2
    moving = 2 * 4 * 128256 * 2048  # the head, as it is sent and as it is received
    assert rank.gradients == parameters * 4 + rank.weights, "two micro-batches are added up whole, in fp32"
    (without,) = make_plan([*LLAMA, "launch.nproc=8", "parallel.zero=1", "parallel.copy_engines=false"]).cost.ranks
    assert without.gradients == rank.gradients + moving, "without copy engines that memory is not kept"
    assert rank.working - without.working == pytest.approx(moving, rel=1e-4)
    (alone,) = make_plan([*LLAMA, "launch.nproc=1"]).cost.ranks
    assert (alone.weights, alone.gathered, alone.optimizer) == (parameters * 4, parameters * 2, parameters * 8)
    (single,) = make_plan(["recipe=llama_1b", "launch.nproc=1", "batch.samples=4"]).cost.ranks
    assert single.gradients == parameters * 2, "one micro-batch's gradients go to AdamW in bf16"
    assert plan.cost.model_flops == pytest.approx(64 * 8192 * (6 * (parameters - 128256 * 2048) + 12 * 16 * 2048 * 8192))


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["parallel.zero=3"], 4 * 2),  # two groups gathered, one as it is sent and as it is received, in bf16
        (["parallel.zero=2"], 4 * 2),
        (["parallel.zero=3", "precision=fp32"], 2 * 4),  # FSDP2 reduces as ever
        (["parallel.zero=3", "parallel.pp=2"], 2 * 2),
        (["parallel.zero=1", "batch.micro=4"], 2 * 2),
        (["parallel.zero=0"], 0),
    ],
)
def test_memory_that_copy_engines_reach_is_counted(words: list[str], kept: int) -> None:
    common = ["recipe=llama_1b", "batch.samples=16", "batch.micro=1", "trainer.compile=false", "launch.nproc=4", *words]
    with_them, without = (make_plan([*common, f"parallel.copy_engines={on}"]).cost.ranks for on in ("true", "false"))
    head = 128256 * 2048
    for one, other in zip(with_them, without, strict=True):
        assert one.working - other.working == pytest.approx(kept * head, rel=1e-4)


def test_experts_of_deepseek_v3_are_dealt_over_2048_gpus() -> None:
    """By hand: a stage of four layers has 128 ranks, of which 64 hold four experts of each layer, and two share their state."""
    plan = make_plan(["recipe=deepseek_v3", "launch.nproc=2048"])
    assert 128 * sum(rank.elements for rank in plan.cost.ranks) == pytest.approx(671_026_404_352, rel=1e-4)
    rank = plan.cost.ranks[1]
    experts = 4 * 4 * 3 * 7168 * 2048
    assert rank.experts == experts // 2
    assert rank.weights == 4 * rank.elements and rank.optimizer == 8 * rank.elements
    dense = rank.elements - rank.experts
    assert rank.gathered - 2 * experts == pytest.approx(2 * 128 * dense, rel=3e-3)  # of padded shards
    assert rank.total < 80e9


def test_a_drawing_that_can_not_be_written_is_a_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["launch.nproc=2", "parallel.pp=2", f"--draw-pipeline={tmp_path / 'nowhere' / 'out.svg'}"]
    code, out, err = planned(capsys, *LLAMA, *words)
    assert code == 1 and "2 processes" in out
    assert err == f"meshloom plan: {tmp_path / 'nowhere' / 'out.svg'}: No such file or directory\n"


def test_reports_savings_of_fused_swiglu_where_supported(capsys: pytest.CaptureFixture[str]) -> None:
    less = "8.00 GiB less where SwiGLU is computed inside its products: Hopper GPUs, pip install 'meshloom[flash4]'"
    for words, said in (
        ([], True),
        (["trainer.activation=full"], False),  # nothing is kept that could be spared
        (["trainer.activation=selective"], False),
        (["model.ffn_dim=8200"], False),
        (["precision=fp32", "trainer.compile=false"], False),
        (["parallel.tp=2", "launch.nproc=2"], False),
        (["parallel.pp=2", "launch.nproc=2", "parallel.schedule=zb", "trainer.compile=false"], False),
    ):
        code, out, err = planned(capsys, *LLAMA, "launch.nproc=1", *words)
        assert code == 0, err
        assert (less in out) is said and ("SwiGLU" in out) is said, words


def test_every_problem_is_named_with_a_fix_and_nothing_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    svg = tmp_path / "out.svg"
    words = ["launch.nproc=8", "parallel.tp=3", "trainer.activation=some", "parallel.shedule=zb", f"--draw-pipeline={svg}"]
    code, out, err = planned(capsys, *LLAMA, *words)
    assert code == 2 and not out and not svg.exists()
    assert "trainer.activation: there is no 'some'" in err
    assert "did you mean parallel.schedule?" in err
    code, _, err = planned(capsys, *LLAMA, "launch.nproc=8", "parallel.tp=3")
    assert code == 2 and "nearest: parallel.tp=4; or parallel.tp=2; or parallel.tp=8" in err
    code, _, err = planned(capsys, *LLAMA, "launch.nproc=1", f"--draw-pipeline={svg}")
    assert code == 2 and "there is no pipeline with parallel.pp=1" in err


def test_data_that_is_not_here_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = planned(capsys, *LLAMA, "launch.nproc=1", "data=text", "data.input=/nowhere/at/all")
    assert code == 0 and "/nowhere/at/all" in out


def test_nodes_count(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = planned(capsys, *LLAMA, "launch.nproc=8", "launch.nodes=2", "parallel.replicate=2")
    assert code == 0 and "16 processes: replicate 2 × shard 8, ZeRO-1" in out


def test_says_how_gradients_are_exchanged_between_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    """The note counts hosts as the predicted time does: by the cluster's GPUs a node where one is named."""
    nodes = ["launch.nproc=4", "launch.nodes=4"]
    _, out, _ = planned(capsys, *LLAMA, *nodes)
    said = " ".join(out.split())
    assert "gradients (dense) are exchanged in levels among 4 × 4 ranks: 6 messages a rank" in said
    embedding = 128_256 * 2048  # 2 tensors of fp32, of a fourth of its rows
    assert f"up to {2 * 4 * embedding / 4 / 2**30:.3g} GiB on a rank" in said
    assert "whole matrices" not in said
    _, out, _ = planned(capsys, *LLAMA, *nodes, "optim=muon")
    assert "whole matrices travel in levels among 4 × 4 ranks: 6 messages a rank" in " ".join(out.split())
    _, out, _ = planned(capsys, *LLAMA, *nodes, "cluster=h100x16")
    assert "in levels among 8 × 2 ranks: 8 messages a rank" in " ".join(out.split())
    _, out, _ = planned(capsys, *LLAMA, *nodes, "parallel.gradient_exchange=direct")
    assert "directly among 16 ranks: 15 messages a rank" in " ".join(out.split())
    _, out, _ = planned(capsys, *LLAMA, "launch.nproc=4")
    assert "are exchanged" not in out


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "dualpipev"])
def test_the_drawing_shows_every_action(capsys: pytest.CaptureFixture[str], tmp_path: Path, schedule: str) -> None:
    svg = tmp_path / "out.svg"
    layout = ["launch.nproc=4", "parallel.pp=4", f"parallel.schedule={schedule}"]
    words = [*LLAMA, *layout, "batch.micro=4", "trainer.activation=none", "trainer.compile=false"]
    code, out, _ = planned(capsys, *words, "--draw-pipeline", str(svg))
    assert code == 0 and f"drew {svg}" in out.replace("\n", "")
    timeline = make_plan(words).cost.timeline
    assert timeline is not None
    root = ElementTree.fromstring(svg.read_text())
    boxes = [box for box in root.iter("{http://www.w3.org/2000/svg}rect") if len(box)]
    assert len(boxes) == sum(len(row) for row in timeline.spans)
    assert f"bubble {timeline.bubble:.1%}" in svg.read_text()
    assert svg.read_text() == pipeline_svg(timeline, f"{schedule} on 4 ranks, 16 micro-batches")


def test_ranks_in_few_words() -> None:
    assert [written_ranks(ranks) for ranks in ([3], [0, 1], [0, 4], range(8), range(0, 64, 8))] == [
        "3",
        "0, 1",
        "0, 4",
        "0–7",
        "0, 8, 16, …, 56",
    ]
    assert axis_groups(Layout(pp=2, shard=2, tp=2), "pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_stages_are_listed_with_what_each_needs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=long_context", "launch.nproc=8", "stages.long.parallel.cp=8", "stages.long.batch.micro=1"]
    words.append("stages.long.trainer.activation=selective")
    assert main(["plan", *words]) == 0
    told = capsys.readouterr().out
    assert "2 stages, 33,000,000,000 tokens:" in told
    assert "base: 512 samples of 8,192, 52.8 GiB at most" in told
    assert "long: 64 samples of 65,536, 19.7 GiB at most" in told


def test_a_step_is_drawn_under_hybrid_data_parallelism(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    corpus, svg = tmp_path / "corpus.txt", tmp_path / "step.svg"
    corpus.write_text("\n\n".join("word " * (n % 97 + 3) for n in range(400)))
    words = ["recipe=quickstart", "data=text", f"data.input={corpus}", "data.separator='\\n\\n'", "data.tokenizer=bytes"]
    words += ["data.document_mask=true", f"data.cache_dir={tmp_path / 'cache'}", "launch.nproc=4", f"--draw-step={svg}"]
    code, out, err = planned(capsys, *words)
    assert code == 2 and not out and "--draw-step" in err and "parallel.hdp=greedy" in err
    code, out, err = planned(capsys, *words, "parallel.hdp=greedy", "parallel.hdp_tokens=64", "parallel.zero=1")
    assert code == 0 and "drew" in out and "each sample is taken for one document" in out, err
    assert "documents, 64 positions at most" in out
    assert "documents of" in svg.read_text()


def test_kernels_of_experts_are_counted_where_a_run_can_use_them() -> None:
    """A plan does not know which kernels the GPUs have: the larger need counts, unless the run uses no kernels."""
    words = [
        "recipe=moe_tiny",
        "model.dim=64",
        "model.experts.ffn_dim=64",
        "launch.nproc=2",
        "precision=bf16",
        "trainer.compile=false",
    ]

    def planned_with(*more: str) -> tuple[bool | None, ...]:
        """Plan with GPUs of which nothing is known, that have no kernels, and that have them; tell which plans fuse experts."""
        run = resolve_plan([*words, *more]).config
        return tuple(checked_plan(run, fused=fused).job.fused_experts for fused in (None, False, True))

    assert planned_with() == (None, False, True)
    for keeps in ("parallel.ep=2", "precision=fp32", "model.experts.capacity=2", "model.experts.ffn_dim=72"):
        assert planned_with(keeps) == (False, False, False), keeps
    run = resolve_plan([*words, "trainer.activation=none"]).config
    plan, fused = (checked_plan(run, fused=fused) for fused in (False, True))
    assert spared_by_fusing(plan, run) == plan.bytes - fused.bytes > 0
