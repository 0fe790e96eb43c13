"""Plans under hybrid data parallelism: rows and waiting of a step of known documents, its time, memory and capacity."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from meshloom.config.problems import ConfigError
from meshloom.launch.cli import main
from meshloom.launch.plan_cluster import predict
from meshloom.launch.plan_documents import mean_length
from meshloom.launch.planning import make_plan, plan_of, resolve_plan
from meshloom.launch.tune_search import row_sizes, tune
from meshloom.parallel.hybrid.cost import CostModel
from meshloom.parallel.hybrid.hidden_copies import HiddenCopies
from meshloom.parallel.hybrid.share import HybridAssigner
from meshloom.parallel.layout import Layout
from meshloom.planner.cluster import load_cluster
from meshloom.planner.hybrid import dealt_step
from meshloom.trainer.costs import assigner_of, inventory_of, job_of

WORDS = ["recipe=quickstart", "data=stdlib", "model.vocabulary=300", "data.document_mask=true", "data.packing=bestfit"]
WORDS += ["data.seq_len=1024", "batch.micro=1", "batch.samples=16", "launch.nproc=4", "parallel.zero=1", "parallel.hdp=greedy"]


def test_a_step_is_counted_as_it_is_dealt() -> None:
    """By hand: a document of 200 over two ranks, two of 50 beside it, rows of 100; each rank has 150 tokens, in two rows."""
    dealer = HybridAssigner(2, CostModel(0.0, 1.0), capacity=100)
    found = dealt_step([200, 50, 50], dealer, 200, 1)
    assert (found.rows, found.shared, found.waiting) == (2, 1, 0.0)
    assert found.filled == 300 / (2 * 2 * 100) and found.length == (200**2 + 2 * 50**2) / 300
    one = dealt_step([40], dealer, 200, 1)  # the other rank waits for all of it, or both share it
    assert one.waiting == pytest.approx(0.5) or one.shared


def test_pipelines_wait_for_their_slowest_row() -> None:
    even = dealt_step([50] * 8, HybridAssigner(2, CostModel(1.0, 1.0), capacity=50, stages=2), 50, 1)
    assert even.waiting == pytest.approx(0.0) and even.filled == 1.0
    uneven = dealt_step([50, *[5] * 20], HybridAssigner(2, CostModel(1.0, 0.0), capacity=50, stages=2), 50, 1)
    assert uneven.waiting > 0.1


def test_a_plan_holds_a_row_and_takes_the_time_of_its_tokens() -> None:
    config = resolve_plan(WORDS).config
    cluster = load_cluster(["cluster=h100"])
    short, long = [64] * 256, [*[64] * 128, *[1024] * 8]
    flops: list[float] = []
    for row in (256, 512):
        sized = replace(config, parallel=replace(config.parallel, hdp_tokens=row))
        plans = [plan_of(sized, (), documents=documents) for documents in (short, long)]
        assert plans[0].job.tokens == row and plans[0].bytes == plans[1].bytes
        predicted = [predict(plan, sized, cluster) for plan in plans]
        assert predicted[0].time.parts["attention"] < predicted[1].time.parts["attention"]
        assert predicted[1].step.length == mean_length(long)
        flops.append(plans[0].cost.ranks[0].flops)
        assert predicted[0].samples * 1024 == sum(short)
    assert flops[0] == pytest.approx(flops[1], rel=1e-9), "as many tokens"
    rows = [make_plan([*WORDS, f"parallel.hdp_tokens={row}"]).bytes for row in (256, 512)]
    assert rows[0] < rows[1]


def test_rows_on_the_host_make_room_in_every_step() -> None:
    """By hand: of documents of n tokens 0.28 × (0.01 n + 3.99) × 0.72 / 10 is copied in time, of one token 0.08.

    Of 25 blocks that is 2, and 4 of documents of 399; rows of 400 are counted so whatever the first step has.
    """
    rule = HiddenCopies(CostModel(0.01, 3.99), token_bytes=10.0, rate=0.72)
    dealer = HybridAssigner(2, CostModel(0.05, 0.0), capacity=400)
    assert rule.share((2, 0, *[1] * 400)) == pytest.approx(0.08064) and rule.share((2, 0, 399)) == pytest.approx(0.1608768)
    for lengths in ([399, 399], [20] * 40, [30]):
        found = dealt_step(lengths, dealer, 399, 1, rule, 25)
        assert (found.on_host, found.host_bytes) == (2, pytest.approx(400 * 10 * 4 / 25))
    bounded = dealt_step([399], dealer, 399, 1, replace(rule, host_bytes=200.0), 25)
    assert (bounded.on_host, bounded.host_bytes) == (1, pytest.approx(200)), "400 tokens in 25 blocks of 0.4 bytes"
    fast = dealt_step([399], dealer, 399, 1, replace(rule, rate=100.0), 25)
    assert (fast.on_host, fast.host_bytes) == (23, pytest.approx(400 * 10 * 23 / 25)), "the last two stay on the device"
    assert dealt_step([399], dealer, 399, 1).on_host == 0


@pytest.mark.parametrize("quadratic", [0.0, 0.02])
@pytest.mark.parametrize("host_bytes", [300.0, 1500.0, math.inf])
def test_no_row_of_any_step_takes_more_than_its_plan(quadratic: float, host_bytes: float) -> None:
    """Rows as a run keeps them, of any documents: positions of blocks on the device, and bytes on the host."""
    hidden = HiddenCopies(CostModel(quadratic, 3.0, windows=((8, 0.05),)), 10.0, rate=1.2, host_bytes=host_bytes)
    dealer, layers, draw = HybridAssigner(4, CostModel(0.05, 1.0), capacity=100), 12, random.Random(0)
    planned = dealt_step([100], dealer, 200, 1, hidden, layers)
    most_left, most_kept = 0.0, 0.0
    for _ in range(60):
        longest = draw.choice((1, 12, 200))
        lengths = [draw.randint(1, longest) for _ in range(draw.randint(1, 60))]
        plan = dealer.plan(lengths, 200, 1)
        for rows in plan.rows:
            for row in rows:
                rings = plan.rings(row, lengths, [])
                tokens = sum(lengths[at] for at in row.whole)
                tokens += sum(lengths[plan.shared[at].document] / plan.shared[at].ranks for at in row.shared)
                count = len(hidden.layers(rings, layers))
                most_left = max(most_left, tokens * (layers - count))
                most_kept = max(most_kept, tokens * 10 * count / layers)
    assert 0.8 < most_left / (100 * (layers - planned.on_host)) < 1 + 1e-9
    assert 0.8 < most_kept / planned.host_bytes < 1 + 1e-9


def corpus(folder: Path, lengths: Sequence[int] = (*[30] * 200, *[300] * 20, 1000)) -> list[str]:
    """Words for a corpus of documents of these lengths, by default some, of which few are long."""
    file = folder / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": "x" * length}) for length in lengths))
    words = [word for word in WORDS if not word.startswith("data=")]
    return [*words, "data=jsonl", f"data.input={file}", "data.tokenizer=bytes", f"data.cache_dir={folder / 'cache'}"]


def test_own_documents_are_planned_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*corpus(tmp_path), "parallel.hdp_tokens=512", "cluster=h100", "--documents=data"]
    assert main(["plan", *words, "--parts"]) == 0
    told = capsys.readouterr().out
    assert "512 positions at most" in told and "parallel.hdp: the first step's documents" in told
    assert "each sample is taken" not in told and "own documents of the first step" in told and "half of all tokens" in told
    assert main(["plan", *words, f"--against={tmp_path}"]) == 2
    assert "not read again" in capsys.readouterr().err


def test_tune_finds_the_capacity_of_rows(tmp_path: Path) -> None:
    found = tune([*corpus(tmp_path), "trainer.activation=none"], 8 * 2**30)
    sizes = {one.settings["parallel.hdp_tokens"] for one in found.fitting}
    assert {256, 512, 1024} <= sizes and "batch.micro" not in found.fitting[0].settings
    best = found.fitting[0]
    assert any(word.startswith("parallel.hdp_tokens=") for word in found.changes(best)) or best.settings == found.given
    by_size = {one.settings["parallel.hdp_tokens"]: one.bytes for one in found.fitting}
    assert by_size[256] < by_size[1024]


def test_capacity_counts_what_rows_keep_on_the_host(tmp_path: Path) -> None:
    """Activations are alike in 8 blocks, so that n of them on the host leave (8 − n) / 8."""
    words = [*corpus(tmp_path, [1000] * 40), "trainer.activation=none", "model.layers=8", "parallel.hdp_costs=h100"]
    plain, hidden = (
        {one.settings["parallel.hdp_tokens"]: one for one in tune([*words, f"parallel.hdp_offload={on}"], 8 * 2**30).fitting}
        for on in ("false", "true")
    )
    assert plain.keys() == hidden.keys()
    away: list[int] = []
    for size in sorted(size for size in hidden if size is not None):
        one = hidden[size]
        dealt, before = one.plan.dealt, plain[size]
        assert dealt is not None and before.plan.dealt is not None and before.plan.dealt.on_host == 0
        activations = before.plan.cost.ranks[0].activations
        assert before.bytes - one.bytes == activations * dealt.on_host // 8
        assert one.host - before.host == round(4 * dealt.host_bytes)
        assert activations * dealt.on_host / 8 <= 1.04 * dealt.host_bytes <= 1.04 * activations * 6 / 8
        away.append(dealt.on_host)
    assert max(away) > 0


def test_copies_of_rows_on_the_host_are_counted_for_any_documents() -> None:
    words = [*WORDS, "parallel.hdp_tokens=512", "parallel.hdp_costs=h100", "trainer.activation=none", "model.layers=8"]
    found = make_plan([*words, "parallel.hdp_offload=true"])
    assert found.dealt is not None and found.dealt.on_host
    assert any("of 8 blocks on the host" in note for note in found.notes)
    known = plan_of(resolve_plan([*words, "parallel.hdp_offload=true"]).config, (), documents=[1024] * 16)
    assert found.bytes == known.bytes < make_plan(words).bytes and found.away == known.away


LLAMA = ["recipe=llama_8b", "data=stdlib", "launch.nproc=8", "data.document_mask=true", "data.packing=bestfit"]
LLAMA += ["data.seq_len=131072", "batch.micro=1", "batch.samples=16", "parallel.zero=3", "trainer.compile=true"]
LLAMA += ["parallel.hdp=greedy", "parallel.hdp_tokens=32768", "parallel.hdp_costs=h200", "trainer.activation=none"]


def test_a_host_holds_a_full_row_beside_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 32K of documents of 128K, at the bound of the host's memory: the documented example."""
    monkeypatch.setattr("meshloom.launch.tune_search.step_documents", lambda *_: [131_072] * 16)
    words = [*LLAMA, "parallel.hdp_offload=true"]
    host, gpu = load_cluster(["cluster=h200"]).host_memory * 2**30, 400 * 2**30
    one = tune(words, gpu, host=host).fitting[0]
    assert one.plan.dealt is not None and 8 * one.plan.dealt.pinned_bytes == pytest.approx(host / 2), "at the bound"
    assert tune(words, gpu, host=8 * one.host).fitting
    with pytest.raises(ConfigError) as refusal:
        tune(words, gpu, host=8 * one.host - 8)
    (problem,) = refusal.value.problems
    assert problem.key == "parallel.hdp_offload" and problem.fix == "use false, or fewer parallel.hdp_tokens"
    assert "for snapshots" in problem.message and "rows may pin 950" in problem.message
    assert tune([*LLAMA, "parallel.hdp_offload=false"], gpu, host=8 * one.host - 8).fitting


def test_capacities_hold_the_longest_document_on_all_ranks() -> None:
    assert row_sizes(tokens=100_000, seq_len=8192, ranks=4) == [2048, 4096, 8192, 16_384, 32_768]
    assert row_sizes(tokens=300, seq_len=64, ranks=4) == [64, 128]


def test_an_activation_left_to_the_plan_is_fitted_to_rows() -> None:
    config = resolve_plan([*WORDS, "parallel.hdp_tokens=512"]).config
    layout = Layout.plan(config.parallel, 4)
    job = job_of(config, inventory_of(config).shape, assigner_of(config, layout), fused=False)
    assert (job.tokens, job.micro_batches) == (512, 16 * 1024 // (4 * 512))


def test_rows_are_filled_up_as_they_run() -> None:
    """A row of 30 tokens on each of two ranks, filled up to half of 100: they run 100 positions of 200."""
    dealer = HybridAssigner(2, CostModel(0.0, 1.0), capacity=100, classes=2)
    assert dealt_step([30, 30], dealer, 100, 1).filled == 100 / 200


def test_utilisation_counts_attention_at_the_length_of_documents(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=llama_1b", "data.seq_len=131072", "batch.samples=8", "batch.micro=1", "trainer.activation=full"]
    words += ["cluster=h100x8", "--documents=512", "--json"]
    assert main(["plan", *words]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["mfu"] < 1


def test_documents_ask_for_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a cluster they are refused where they are of times alone, by what the config says and not its words."""
    assert main(["plan", *WORDS, "parallel.hdp=none", "--documents=64"]) == 2
    assert "none is chosen" in capsys.readouterr().err
    assert main(["plan", *WORDS[:-1], "parallel={hdp: greedy}", "--documents=64"]) == 0
    assert "each sample is taken" not in capsys.readouterr().out
    growing = ["batch=stages", "batch.stages='0:8 1B:16'", "batch.samples=null"]
    words = [word for word in WORDS if not word.startswith("batch.samples")]
    for option in (["--documents=64"], ["cluster=h100x4", "--best=1"]):
        assert main(["plan", *words, *growing, *option]) == 2
        assert "batch.samples" in capsys.readouterr().err


def test_a_search_of_layouts_says_that_it_deals_no_documents(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS, "cluster=h100x4", "--best=1"]) == 0
    assert "planned for whole samples" in " ".join(capsys.readouterr().out.split())


def test_a_plan_says_that_measured_steps_are_not_in_it() -> None:
    for words, said in (([], False), (["batch=norm_test", "batch.max=64"], True)):
        run = resolve_plan([*WORDS, *words])
        notes = " ".join(plan_of(run.config, run.notices).notes)
        assert ("measures gradients is not in these figures" in notes) == ("dealt worker by worker" in notes) == said
