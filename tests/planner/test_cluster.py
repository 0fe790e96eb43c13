"""Clusters: recipes, one's own, refusals by key, and the time of collectives on them against closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from meshloom.config.problems import ConfigError
from meshloom.parallel.layout import Layout
from meshloom.planner.cluster import Island, load_cluster, options
from meshloom.planner.network import group, group_of


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_cluster(words)
    return str(caught.value)


def test_every_recipe_is_a_cluster_of_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MESHLOOM_CACHE", str(tmp_path))  # without profiles of this machine
    for name in options():
        cluster = load_cluster([f"cluster={name}x1024"])
        assert cluster.gpus == 1024 and cluster.problems() == [] and cluster.peak("bf16") > 1e14
    assert load_cluster(["cluster=h100", "cluster.price=3", "cluster.rates.link=0.5"]).rates.link == 0.5


def test_a_cluster_of_ones_own_extends_another(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "mine.yaml").write_text("defaults: [a100]\nnics: [{count: 2, gbit: 100}, {count: 1, gbit: 25}]\n")
    cluster = load_cluster(["cluster=minex16"], str(tmp_path))
    assert (cluster.gpus, cluster.bf16, cluster.node_network) == (16, 312, 225e9 / 8)


def test_problems_of_a_cluster_are_told_all_at_once_by_key(tmp_path: Path) -> None:
    assert "cluster: is not chosen; add cluster=…; there are: a100" in refused("cluster.price=2")
    assert "there is no 'h10x512'; did you mean cluster=h100x512?" in refused("cluster=h10x512")
    told = refused("cluster=h100", "cluster.gpuz=3", "cluster.link=x", "cluster.nics=5")
    assert "3 problems" in told and "did you mean cluster.gpu" in told and "cluster.nics: 5 is no list" in told
    told = refused("cluster=h100x12", "cluster.bandwidth=-1", "cluster.rates.products=2", "cluster.price=-1")
    for part in ("bandwidth: -1 can't be", "12 GPUs are no whole number of nodes", "2 is more than all", "-1 is no price"):
        assert part in told
    assert "nothing connects them" in refused("cluster=h100x16", "cluster.nics=[]")
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "half.yaml").write_text("gpu: half a GPU\n")
    with pytest.raises(ConfigError, match=r"cluster\.memory: is not set; give GiB of a GPU"):
        load_cluster(["cluster=half"], str(tmp_path))


def test_impossible_values_of_a_cluster_are_refused_by_key(tmp_path: Path) -> None:
    told = refused(
        "cluster=h100", "cluster.nics=[{count: 4", "cluster.gpus=.inf", "cluster.gpus_per_node=.nan", "cluster.gpu.a=1"
    )
    for part in (
        "nics: [{count: 4 is no YAML",
        "gpus: inf is not",
        "per_node: nan is not",
        "cluster.gpu has no keys of its own",
    ):
        assert part in told
    told = refused("cluster=h100x16", "cluster.islands=[{nodes: 2, gbit: 0}, {nodes: 0, gbit: 8}]", "cluster.between=8")
    assert "islands[0]: 2 × 0 Gbit/s can't be" in told and "islands[1]: 0 × 8" in told
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, text in {
        "word": "defaults: h100",
        "one": "defaults: [two]",
        "two": "defaults: [one]",
        "no": "defaults: [h100]\nrates: 5",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    for name, part in (
        ("word", "defaults: 'h100' is no list of clusters; write for example defaults: [h100]"),
        ("one", "two.yaml extends 'one', which is no other cluster"),
        ("no", "cluster.rates: 5 has no keys"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_cluster([f"cluster={name}"], str(tmp_path))
        assert part in str(caught.value)


def test_ones_own_cluster_may_extend_its_namesake(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "h100.yaml").write_text("defaults: [h100]\nprice: 2\nrates:\n")
    cluster = load_cluster(["cluster=h100x16", "cluster.rates.link=0.7"], str(tmp_path))
    assert (cluster.gpus, cluster.price, cluster.bf16, cluster.rates.link) == (16, 2.0, 989, 0.7)
    assert cluster.rates.products == 0.76


def test_collectives_have_their_closed_form() -> None:
    """(P − 1)/P · S/B and a ring's latency; across nodes B is what the group's ranks of a node have of its cards together."""
    cluster = load_cluster(["cluster=h100x64"])
    rates = cluster.rates
    inside = group(cluster, 8)
    expected = 7 / 8 * 1e9 / (450e9 * rates.link) + 7 * rates.latency
    assert inside.gather(1e9) == pytest.approx(expected) and inside.all_reduce(1e9) == pytest.approx(2 * expected)
    # All of a node's ranks share its 400 GB/s; one rank of each node has 50 of them.
    assert group(cluster, 64).bandwidth == pytest.approx(400e9 * rates.network)
    assert group(cluster, 8, stride=8).bandwidth == pytest.approx(50e9 * rates.network)
    assert group(cluster, 1).gather(1e9) == 0.0
    # Ranks 6, 8 and 10 are one group: the end of a node cuts it, and one of them is alone on its node.
    cut = group_of(load_cluster(["cluster=h100x24"]), Layout(tp=2, pp=4, shard=3), "shard")
    assert (cut.ranks, cut.here) == (3, 1) and cut.bandwidth == pytest.approx(50e9 * rates.network)
    layout = Layout(shard=8, tp=8)
    assert group_of(cluster, layout, "tp") == inside and group_of(cluster, layout, "shard") == group(cluster, 8, 8)


def test_an_all_to_all_has_its_closed_form() -> None:
    """Every rank sends S/P to each other one: over its links inside its node, over its own share of the cards to the rest."""
    cluster = load_cluster(["cluster=h100x64"])
    rates = cluster.rates
    link, card = 450e9 * rates.link, 50e9 * rates.network  # eight cards of 400 Gbit/s for eight GPUs
    assert group(cluster, 8).exchange(1e9) == pytest.approx(7 / 8 * 1e9 / link + 7 * rates.latency)
    whole = group(cluster, 64)
    assert whole.exchange(1e9, 3) == pytest.approx(56 / 64 * 1e9 / card + 3 * whole.latency)
    wide = group(cluster, 8, stride=8)  # one rank of each node: an all-to-all then is as fast as a ring
    assert wide.exchange(1e9) == pytest.approx(7 / 8 * 1e9 / card + wide.latency) == wide.gather(1e9)
    fast = group(replace(cluster, link=10.0), 64)
    assert fast.exchange(1e9) == pytest.approx(56 / 64 * 1e9 / fast.local + fast.latency)  # no card outruns its GPU's link
    assert group(cluster, 1).exchange(1e9) == 0.0


def test_groups_inside_an_island_have_its_network() -> None:
    """Holmes, arXiv 2312.03549: stages of a pipeline on islands of their own keep their groups off the slow link."""
    cluster = replace(load_cluster(["cluster=a100x32"]), islands=[Island(2, 1600), Island(2, 800)], between=100)
    share = cluster.rates.network * 1e9 / 8
    split, mixed = Layout(pp=2, shard=16), Layout(shard=32)
    assert group_of(cluster, split, "shard").bandwidth == pytest.approx(800 * share)
    assert group_of(cluster, split, "pp").bandwidth == pytest.approx(100 / 8 * share)
    assert group_of(cluster, mixed, "shard").bandwidth == pytest.approx(100 * share)
    told = [str(problem) for problem in replace(cluster, between=0.0, gpus=40).problems()]
    assert any("nothing connects the islands" in line for line in told) and any(
        "4 nodes, and the cluster 5" in line for line in told
    )
