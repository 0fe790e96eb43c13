"""Problems that the config alone shows: each is named with its key and a fix."""

from __future__ import annotations

import pytest

from meshloom.config.compose import Composer
from meshloom.trainer.schema import make_composer
from meshloom.trainer.typed import typed_config


@pytest.fixture(scope="module")
def composer() -> Composer:
    return make_composer()


def problems_of(composer: Composer, *overrides: str) -> dict[str, str]:
    composition = composer.compose(["recipe=quickstart", *overrides])
    assert composition.problems == []
    config, untyped = typed_config(composition.config)
    return {problem.key: str(problem) for problem in [*untyped, *config.problems()]}


@pytest.mark.parametrize(
    "recipe", ["quickstart", "moe_tiny", "moe_a1b", "llama_1b", "llama_3b", "llama_8b", "llama_70b", "deepseek_v3"]
)
def test_recipes_are_in_order(composer: Composer, recipe: str) -> None:
    assert problems_of(composer, f"recipe={recipe}") == {}


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("precision=fp8", "precision", "fp32, bf16, fp64"),
        ("seed=-1", "seed", "use 0 up"),
        ("seed=9223372036854775808", "seed", "2^63"),
        ("optim.lr=inf", "optim.lr", "auto:step_law"),
        ("parallel.timeout=0", "parallel.timeout", "600"),
        ("parallel.timeout=nan", "parallel.timeout", "600"),
        ("parallel.timeout=inf", "parallel.timeout", "600"),
        ("parallel.timeout=1e12", "parallel.timeout", "600"),
        ("model.mup_embedding=nan", "model.mup_embedding", "finite"),
        ("model.mup_residual=inf", "model.mup_residual", "finite"),
        ("model.norm_eps=0", "model.norm_eps", "above 0"),
        ("model.rope_theta=nan", "model.rope_theta", "above 0"),
        ("model.logit_softcap=0", "model.logit_softcap", "above 0"),
        ("model.z_loss=-1", "model.z_loss", "0 for none"),
        ("model.qk_norm=each", "model.qk_norm", "none, head, full"),
        ("model.norm_place=below", "model.norm_place", "before, after, around"),
        ("model.layer_types=[local]", "model.layer_types", "full"),
        ("model.layer_types=[]", "model.layer_types", "full"),
        ("model.attention=mha", "model.attention", "gqa, mla"),
        ("model.attention=mla", "model.kv_heads", "attention=gqa"),
        ("model.layer_types=[sliding]", "model.sliding_window", "1024"),
        ("model.sliding_window=64", "model.sliding_window", "leave it null"),
        ("model.attention_softcap=-1", "model.attention_softcap", "above 0"),
        ("model.head_dim=7", "model.head_dim", "odd"),
        ("model.rope_fraction=2", "model.rope_fraction", "up to 1"),
        ("model.experts.count=-1", "model.experts.count", "0 for dense"),
        ("model.experts={count:4,top_k:5}", "model.experts.top_k", "use 1 to 4"),
        ("model.experts={count:4,scores:tanh}", "model.experts.scores", "softmax or sigmoid"),
        ("model.experts={count:4,bias:true}", "model.experts.bias", "sigmoid"),
        ("model.experts={count:4,capacity:0}", "model.experts.capacity", "null to drop no token"),
        ("model.experts={count:4,groups:3}", "model.experts.groups", "divisor"),
        ("model.experts={count:4,groups:2,top_groups:3}", "model.experts.top_groups", "use 1 to 2"),
        ("model.experts={count:6,top_k:3,groups:3}", "model.experts.top_groups", "fewer than top_k"),
        ("model.experts={count:4,layers:[9]}", "model.experts.layers", "not there"),
        ("model.experts={count:4,dense_layers:99}", "model.experts.dense_layers", "no layer is left"),
        ("model.experts={count:4,shared:-1}", "model.experts.shared", "0 or more"),
        ("balance.counts=running", "balance.counts", "past, exact, prefix"),
        ("balance.keep=1", "balance.keep", "[0, 1)"),
        ("balance.z_loss=-1", "balance.z_loss", "0 for none"),
        ("model.rope_scaling.kind=ntk", "model.rope_scaling.kind", "yarn"),
        ("model.rope_scaling.kind=yarn", "model.rope_scaling.original_positions", "8192"),
        ("model.rope_scaling={kind:linear,factor:0.5}", "model.rope_scaling.factor", "1 or more"),
        ("model.rope_scaling={kind:longrope,original_positions:64}", "model.rope_scaling.long_factor", "list"),
        ("model.mup_base=0", "model.mup_base", "1 or more"),
        ("output_dir=''", "output_dir", "folder"),
        ("output_dir='s3://bucket/run'", "output_dir", "checkpoint.folder"),
        ("trainer.steps=0", "trainer.steps", "1 or more"),
        ("trainer.steps=null", "trainer.steps", "trainer.tokens"),
        ("trainer.tokens=10", "trainer.steps", "null"),
        ("trainer.max_grad_norm=0", "trainer.max_grad_norm", "null"),
        ("trainer.eval_every=-1", "trainer.eval_every", "0 for never"),
        ("trainer.eval_samples=0", "trainer.eval_samples", "eval_every=0"),
        ("trainer.activation=some", "trainer.activation", "selective"),
        ("model.heads=6", "model.heads", "use 4 or 8"),
        ("model.heads=128", "model.heads", "odd"),
        ("model.kv_heads=3", "model.kv_heads", "use 2 or 4"),
        ("model.layers=0", "model.layers", "1 or more"),
        ("launch.nproc=many", "launch.nproc", "auto"),
        ("launch.nodes=0", "launch.nodes", "1 or more"),
        ("launch.time=soon", "launch.time", "hours"),
        ("logging.every=0", "logging.every", "1"),
    ],
)
def test_problem_names_key_and_fix(composer: Composer, override: str, key: str, says: str) -> None:
    found = problems_of(composer, override)
    assert list(found) == [key]
    assert says in found[key]


def test_all_are_found_at_once(composer: Composer) -> None:
    found = problems_of(composer, "precision=half", "trainer.steps=null", "model.kv_heads=3", "launch.nproc=0")
    assert list(found) == ["precision", "model.kv_heads", "trainer.steps", "launch.nproc"]


def test_missing_values_are_named(composer: Composer) -> None:
    assert list(problems_of(composer, "model.dim='???'", "model.heads='???'")) == ["model.dim", "model.heads"]
