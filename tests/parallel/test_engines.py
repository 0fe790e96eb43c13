"""Refusals of either engine, before anything is started; DeepSpeed's derived configuration; offloading by FSDP2."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from meshloom.config.problems import ConfigError
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.optim.optimizers.parameters import NamedParameter, Shards
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.deepspeed import keys
from meshloom.parallel.deepspeed.config import QUANTISED, derive, lossy_features
from meshloom.parallel.deepspeed.optimizer import cpu_adam, optimizer_problems, updates_elementwise
from meshloom.parallel.deepspeed.settings import DeepSpeedConfig
from meshloom.parallel.deepspeed.setup import import_deepspeed
from meshloom.parallel.limits import engine_problems
from meshloom.trainer.schema import make_composer
from support.engines import masters_of
from support.parity import Work, build, curves, plain_curve, step
from support.ranks import run_ranks


def adamw(parameters: Sequence[NamedParameter], shards: Shards) -> torch.optim.Optimizer:
    return AdamW(AdamWConfig(lr=1e-2), parameters, shards)


def problems(precision: str = "bf16", world_size: int = 8, **settings: object) -> dict[str, str]:
    """Key → message of everything wrong with a DeepSpeed recipe, apart from DeepSpeed itself being there."""
    parallel = ParallelConfig(**{"engine": "deepspeed", **settings})  # type: ignore[arg-type]
    found = engine_problems(parallel, precision=precision, world_size=world_size)
    return {problem.key: str(problem) for problem in found if problem.message != "DeepSpeed is not installed"}


QUANTISED_WEIGHTS = DeepSpeedConfig(config={"zero_optimization": {"zero_quantized_weights": True}})


def extra(tree: dict[str, object], **settings: object) -> dict[str, str]:
    return problems(deepspeed=DeepSpeedConfig(config=tree), **settings)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_run_that_works_is_not_refused(zero: int) -> None:
    assert problems(zero=zero) == {}
    assert problems(zero=zero, offload="cpu") == {}
    assert problems("fp32", zero=0) == {}
    assert problems("fp32", engine="torch", zero=0, deepspeed=DeepSpeedConfig(config={"aio": {"queue_depth": 8}})) == {}
    assert problems(zero=3, offload="nvme", offload_weights="nvme", offload_path="/fast") == {}
    assert extra({"zero_optimization": {"zero_hpz_partition_size": 4, "reduce_bucket_size": 5e8}, "log_level": "info"}) == {}
    assert extra({"zero_optimization": {"overlap_comm": False, "offload_optimizer": {}}, "aio": {}}) == {}
    assert problems(zero=3, deepspeed=QUANTISED_WEIGHTS) == {}  # planned on a machine without GPUs, too
    swapped = {"offload_optimizer": {"buffer_count": 5, "pipeline_read": True}, "offload_param": {"max_in_cpu": 0}}
    away = {"zero": 3, "offload": "nvme", "offload_weights": "nvme", "offload_path": "/fast"}
    assert extra({"zero_optimization": swapped, "aio": {"queue_depth": 8, "single_submit": True}}, **away) == {}
    assert extra({"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}, zero=zero, offload="cpu") == {}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"tp": 2}, "parallel.tp"),
        ({"pp": 2}, "parallel.pp"),
        ({"cp": 2}, "parallel.cp"),
        ({"replicate": 2}, "parallel.replicate"),
        ({"precision": "fp64"}, "precision"),
        ({"zero": 0}, "parallel.zero"),
        ({"zero": 2, "deepspeed": QUANTISED_WEIGHTS}, QUANTISED),
        ({"offload": "disk"}, "parallel.offload"),
        ({"offload": "nvme"}, "parallel.offload_path"),
        ({"offload": "nvme", "offload_path": "/fast", "zero": 2}, "parallel.offload"),
        ({"offload": "cpu", "zero": 0, "precision": "fp32"}, "parallel.offload"),
        ({"offload_weights": "cpu"}, "parallel.offload_weights"),
        ({"offload": "cpu", "offload_weights": "cpu", "zero": 2}, "parallel.offload_weights"),
        ({"deepspeed": DeepSpeedConfig(cpu_adam=True)}, "parallel.deepspeed.cpu_adam"),
        ({"engine": "torch", "offload": "nvme"}, "parallel.offload"),
        ({"engine": "torch", "offload": "cpu", "tp": 2}, "parallel.offload"),
        ({"engine": "torch", "offload_weights": "cpu"}, "parallel.offload_weights"),
    ],
)
def test_an_impossible_layout_is_refused_by_its_key(settings: dict[str, object], key: str) -> None:
    assert key in problems(**settings)  # type: ignore[arg-type]


def test_an_unknown_engine_is_refused_by_its_key() -> None:
    assert [problem.key for problem in ParallelConfig(engine="jax").problems()] == ["parallel.engine"]


@pytest.mark.parametrize(
    ("tree", "path", "says"),
    [
        ({"train_batch_size": 8}, "train_batch_size", "batch.samples"),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "trainer.max_grad_norm"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1}}}, "optimizer.params.lr", "optim"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "precision"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "parallel.zero"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device",
            "parallel.offload",
        ),
        ({"zero_optimization": {"round_robin_gradients": True}}, "zero_optimization.round_robin_gradients", "corrupts"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size", "removed"),
        ({"zero_optimization": {"zero_hpz_partition_size": 3}}, "zero_optimization.zero_hpz_partition_size", "divides"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size", "parallel.cp_kind=ulysses"),
        ({"reduce_bukket_size": 5}, "reduce_bukket_size", "does not read"),
        ({"zero_optimization": {"reduce_bukket_size": 5}}, "zero_optimization.reduce_bukket_size", "reduce_bucket_size"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size", "not a count"),
        ({"zero_optimization": {"sub_group_size": -1}}, "zero_optimization.sub_group_size", "not a count"),
        ({"zero_optimization": {"sub_group_size": float("inf")}}, "zero_optimization.sub_group_size", "not a count"),
        ({"zero_optimization": {"sub_group_size": float("nan")}}, "zero_optimization.sub_group_size", "not a count"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "zero_optimization.reduce_bucket_size", "1 or more"),
        ({"zero_optimization": {"allgather_bucket_size": 0}}, "zero_optimization.allgather_bucket_size", "1 or more"),
        ({"zero_optimization": {"overlap_comm": "maybe"}}, "zero_optimization.overlap_comm", "neither true nor false"),
        ({"log_level": "foo"}, "log_level", "warning"),
        ({"aio": {"queue_depth": None}}, "aio.queue_depth", "not a count"),
        ({"zero_optimization": {"sub_group_size": None}}, "zero_optimization.sub_group_size", "not a count"),
        ({"disable_allgather": True}, "disable_allgather", "does nothing with it; leave it out"),
        ({"sparse_gradients": False}, "sparse_gradients", "has removed it; leave it out"),
        ({"nebula": {"enabled": True}}, "nebula.enabled", "checkpoints are this framework's own"),
        ({"wandb": {"enabled": True}}, "wandb.enabled", "logging.wandb"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.0}}}, "zero_optimization.offload_optimizer.ratio", "splits"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_optimization.zero_quantized_gradients", "fp16"),
        ({"zero_optimization": 3}, "zero_optimization", "is a group of keys, not 3; give it some of allgather_bucket_size"),
        ({"zero_optimization": None}, "zero_optimization", "is a group of keys, not None"),
        ({"aio": True}, "aio", "is a group of keys"),
        ({"aio": {"queue_deph": 8}}, "aio.queue_deph", "the keys open to you there are block_size"),
        ({"aio": {"queue_depth": 8}}, "aio.queue_depth", "only with parallel.offload=nvme"),
        ({"aio": {"use_gds": True}}, "aio.use_gds", "past the host"),
        (
            {"zero_optimization": {"offload_optimizer": {"buffer_count": 5}}},
            "zero_optimization.offload_optimizer.buffer_count",
            "only with parallel.offload=nvme; leave it out",
        ),
        (
            {"zero_optimization": {"offload_param": {"pin_memory": False}}},
            "zero_optimization.offload_param.pin_memory",
            "parallel.offload_weights=cpu",
        ),
        (
            {"zero_optimization": {"param_persistence_threshold": 5}},
            "zero_optimization.param_persistence_threshold",
            "use stage3_param_persistence_threshold",
        ),
        (
            {"zero_optimization": {"cpu_offload_use_pin_memory": True}},
            "zero_optimization.cpu_offload_use_pin_memory",
            "use offload_optimizer.pin_memory",
        ),
        ({"zero_optimization": {"parameter_alignment": True}}, "zero_optimization.parameter_alignment", "pads"),
        ({"zero_optimization": {"offload_param": {"buffer": 1}}}, "zero_optimization.offload_param.buffer", "does not read"),
    ],
)
def test_conflicts_of_the_escape_hatch_are_named(tree: dict[str, object], path: str, says: str) -> None:
    assert says in extra(tree)[f"parallel.deepspeed.config.{path}"]


def test_null_is_taken_where_it_is_deepspeeds_own_default() -> None:
    nulls: dict[str, object] = {"steps_per_print": None, "aio": None, "flops_profiler": {"output_file": None}}
    zero: dict[str, object] = {"overlap_comm": None, "offload_optimizer": None, "offload_param": None, "zenflow": None}
    tree = {**nulls, "zero_optimization": {**zero, "leaf_module": None, "round_robin_gradients": False}}
    assert extra(tree) == {}
    assert "a group of keys" in extra(tree, offload="cpu")["parallel.deepspeed.config.zero_optimization.offload_optimizer"]
    derived = derive(ParallelConfig(zero=2, deepspeed=DeepSpeedConfig(config=tree)), "bf16", pin_memory=False)
    assert derived["steps_per_print"] is None and derived["zero_optimization"]["overlap_comm"] is None
    assert not {"leaf_module", "zenflow"} & {*derived["zero_optimization"]}
    if importlib.util.find_spec("deepspeed"):
        from deepspeed.runtime.config import DeepSpeedConfig as Theirs

        theirs = Theirs(derived)
        assert theirs.steps_per_print is None and theirs.zero_config.overlap_comm is False
        assert theirs.zero_config.offload_optimizer is None and theirs.aio_config["queue_depth"] == 8


class Recorded(dict[str, object]):
    """A dict that notes which keys it is asked for."""

    asked: set[str]

    def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Recorded:  # type: ignore[override]
        return self

    def __copy__(self) -> Recorded:
        return self


def test_top_level_keys_are_those_that_deepspeed_reads() -> None:
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    from deepspeed.runtime import config as theirs

    tree = Recorded(train_micro_batch_size_per_gpu=1)
    tree.asked = set()
    theirs.DeepSpeedConfig(tree)
    tables = (keys.DECIDED, keys.REFUSED, keys.REMOVED, keys.OPEN)
    known = {path.partition(".")[0] for table in tables for path in table}
    assert len(tree.asked) > 50
    assert tree.asked <= known
    assert known - tree.asked == {"seed", "sequence_parallel_size"}  # its data efficiency reads one, its mesh the other
    removed = {
        *theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS,
        *(f"zero_optimization.{key}" for key in theirs._REMOVED_ZERO_CONFIG_KEYS),
    }
    assert {*keys.REMOVED} == removed


def test_the_keys_are_those_that_deepspeed_reads() -> None:
    """Every name of every field of its configuration of ZeRO is decided, refused, an alias or open; no other is."""
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    places = {"": DeepSpeedZeroConfig, "offload_optimizer.": DeepSpeedZeroOffloadOptimizerConfig}
    places["offload_param."] = DeepSpeedZeroOffloadParamConfig
    theirs = {
        f"zero_optimization.{place}{word}"
        for place, kind in places.items()
        for name, field in kind.model_fields.items()
        for word in (name, field.alias or name)
        if f"{name}." not in places
    } | {f"aio.{name}" for name in AIO_DEFAULT_DICT}
    closed = {*keys.DECIDED, *keys.REFUSED, *keys.ALIASES}
    assert theirs <= closed | {*keys.OPEN}
    assert {key for key in keys.OPEN if key.startswith(("zero_optimization.", "aio."))} <= theirs
    assert not closed & {*keys.OPEN}
    for alias, name in keys.ALIASES.items():
        field = DeepSpeedZeroConfig.model_fields[alias.removeprefix("zero_optimization.")]
        assert (field.alias or name) == name
    for path, least in keys.COUNTS.items():
        place, _, name = path.removeprefix("zero_optimization.").rpartition(".")
        if path.startswith("zero_optimization."):
            assert places[f"{place}." if place else ""](**{name: least}), path


def test_any_key_of_deepspeeds_is_taken_from_the_command_line() -> None:
    line = "parallel.deepspeed.config.zero_optimization.reduce_bucket_size=1000"
    composition = make_composer().compose([line, "parallel.deepspeed.konfig=1"])
    assert composition.config.parallel.deepspeed.config == {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert [problem.key for problem in composition.problems] == ["parallel.deepspeed.konfig"]


def test_all_problems_come_at_once() -> None:
    assert len(extra({"seed": 1, "elasticity": {"enabled": True}}, tp=2, offload="nvme")) == 4


def test_the_derived_configuration_says_what_the_recipe_says() -> None:
    """Given as Hydra gives it; the user's keys join the derived ones, below them too."""
    keys = OmegaConf.create({"zero_optimization": {"offload_optimizer": {"buffer_count": 7}}, "steps_per_print": 10})
    parallel = ParallelConfig(zero=3, offload="nvme", offload_path="/fast", deepspeed=DeepSpeedConfig(config=keys))  # type: ignore[arg-type]
    tree = derive(parallel, "bf16", pin_memory=True)
    assert tree["zero_optimization"]["stage"] == 3
    assert tree["zero_optimization"]["offload_optimizer"] == {
        "device": "nvme",
        "nvme_path": "/fast",
        "pin_memory": True,
        "buffer_count": 7,
    }
    assert "offload_param" not in tree["zero_optimization"]
    assert tree["zero_optimization"]["sub_group_size"] == 10**8
    assert tree["bf16"]["enabled"] and tree["data_types"]["grad_accum_dtype"] == tree["communication_data_type"] == "fp32"
    assert tree["gradient_clipping"] == 0.0 and tree["steps_per_print"] == 10
    written = DeepSpeedConfig(config={"zero_optimization": {"sub_group_size": 1e9}, "aio": {"block_size": 2e6}})
    tree = derive(replace(parallel, deepspeed=written), "bf16", pin_memory=True)
    assert repr((tree["zero_optimization"]["sub_group_size"], tree["aio"]["block_size"])) == "(1000000000, 2000000)"
    assert not derive(ParallelConfig(zero=1), "fp32", pin_memory=False)["bf16"]["enabled"]


def test_exceptions_to_the_rules_are_reported() -> None:
    keys = {"zero_optimization": {"zero_quantized_weights": True, "overlap_comm": False}}
    assert len(lossy_features(ParallelConfig(deepspeed=DeepSpeedConfig(config=keys)))) == 1
    assert lossy_features(ParallelConfig()) == []


class Rows(torch.optim.Optimizer):
    """Normalises each row: not elementwise, and it would not notice flat pieces."""

    def __init__(self, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        super().__init__([{"params": [p.tensor for p in parameters], "lr": 0.1}], {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad / p.grad.norm(dim=-1, keepdim=True)


class Asks(Rows):
    """Asks for sums over whole parameters."""

    def __init__(self, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        super().__init__(parameters, shards)
        shards.sum(torch.zeros(len(parameters)), parameters)


class Holds(Rows):
    """Remembers its parameters' shapes."""

    def __init__(self, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        super().__init__(parameters, shards)
        self.shapes = {p.tensor: p.global_shape for p in parameters}

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= p.grad.view(self.shapes[p])


class Twofold(Rows):
    """Elementwise, with both of its moments in one tensor."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                both = self.state[p].setdefault("both", torch.zeros(2, *p.shape))
                both += torch.stack([p.grad, p.grad**2])
                p.data -= group["lr"] * both[0]


def test_elementwise_optimizers_pass_and_others_are_refused() -> None:
    assert updates_elementwise(adamw)
    assert updates_elementwise(lambda p, s: torch.optim.SGD([{"params": [q.tensor for q in p]}], lr=0.1, momentum=0.9))
    assert not updates_elementwise(Rows)
    assert "neighbours" in str(optimizer_problems(Rows)[0])
    assert "asks for sums" in str(optimizer_problems(Asks)[0])
    assert "fails on flat pieces" in str(optimizer_problems(Holds)[0])
    assert "state of another shape" in str(optimizer_problems(Twofold)[0])


class Cautious(torch.optim.AdamW):
    """A user's own, with another update."""


def test_cpu_adam_is_for_adamw_only() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1))]
    others = torch.optim.SGD(weights), Cautious(weights), torch.optim.AdamW(weights, amsgrad=True)
    for other, named in zip(others, ("SGD", "Cautious", "AdamW with amsgrad"), strict=True):
        with pytest.raises(ConfigError, match=rf"parallel\.deepspeed\.cpu_adam: .* not of {named}"):
            cpu_adam(other)


def test_all_imports_without_the_extra_and_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own modules are imported by the lines above, whether DeepSpeed is there or not."""
    real = builtins.__import__

    def no_deepspeed(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", no_deepspeed)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with pytest.raises(ConfigError, match=r"meshloom\[deepspeed\]"):
        import_deepspeed("cpu")
    found = engine_problems(ParallelConfig(engine="deepspeed"), precision="bf16", world_size=1)
    assert [problem.key for problem in found] == ["parallel.engine"]


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 1), (2, 3)])
def test_fsdp2_offloading_trains_the_same(ranks: int, zero: int) -> None:
    work = Work(ParallelConfig(zero=zero, offload="cpu"), micro=2, steps=4)
    losses, norms = plain_curve(work)
    for rank_losses, rank_norms in run_ranks(ranks, curves, work):
        assert rank_losses == pytest.approx(losses, rel=1e-9)
        assert rank_norms == pytest.approx(norms, rel=1e-9)


def under_way_at_the_end(rank: int, world_size: int, precision: str) -> tuple[int, int]:
    """Gatherings of weights that a step of ZeRO-1 leaves under way: before the engine is finished, and after."""
    work = Work(ParallelConfig(zero=1), precision=precision)
    engine = build(work, world_size)
    step(engine, work, 0)
    units = masters_of(engine).units
    before = sum(bool(unit.gathering) for unit in units)
    engine.finish()
    return before, sum(bool(unit.gathering) for unit in units)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_under_way_when_a_run_ends(precision: str) -> None:
    """Or gloo's thread comes for a tensor while the interpreter ends, and aborts the process."""
    for before, after in run_ranks(2, under_way_at_the_end, precision):
        assert before > 0 and after == 0
