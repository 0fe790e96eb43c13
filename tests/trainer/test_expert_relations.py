"""Keys of a mixture of experts that do not fit other keys: refused before anything starts, all at once."""

from __future__ import annotations

import pytest

from meshloom.config.compose import Composer
from meshloom.trainer.schema import make_composer
from meshloom.trainer.typed import typed_config
from meshloom.trainer.validate import run_problems

RELU = "model.experts.router=relu"
HYBRID = "parallel.hdp=greedy parallel.zero=1 data.document_mask=true"


@pytest.fixture(scope="module")
def composer() -> Composer:
    return make_composer()


def problems_of(composer: Composer, world_size: int, *overrides: str) -> dict[str, str]:
    composition = composer.compose([*overrides])
    assert composition.problems == []
    return {problem.key: str(problem) for problem in run_problems(typed_config(composition.config)[0], world_size)}


@pytest.mark.parametrize(
    ("world_size", "words"),
    [
        (1, ""),
        (2, "parallel.tp=2 parallel.ep=2"),
        (2, "parallel.pp=2"),
        (2, "parallel.pp=2 model.experts.router=recurrent"),
        (2, "parallel.pp=2 parallel.schedule=zb model.experts.router=relu balance.locality=0.002 balance.chunk_sparsity=0.05"),
        (4, "batch=norm_test"),
        (8, "parallel.ep=4 parallel.replicate=2"),
        (2, f"{HYBRID} parallel.ep=2"),
        (2, f"{HYBRID} batch=norm_test"),
    ],
)
def test_mixtures_run_in_these_layouts(composer: Composer, world_size: int, words: str) -> None:
    assert problems_of(composer, world_size, "recipe=moe_tiny", *words.split()) == {}


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        ("model.experts.capacity=1e-6", "model.experts.capacity", "less than one"),
        ("balance.bias_rate=0.001", "balance.bias_rate", "model.experts.bias=true"),
        ("parallel.tp=2 parallel.sequence_parallel=false", "parallel.sequence_parallel", "set it to true"),
        ("parallel.tp=2 batch=norm_test", "batch", "can't be measured under tensor parallelism"),
        ("parallel.ep=2 batch=norm_test", "batch", "can't be measured under expert parallelism"),
        ("parallel.ep=2 trainer.activation=selective trainer.compile=true", "trainer.activation", "allows no pause"),
        (f"{HYBRID} balance.sequence=0.1 balance.counts=prefix", "balance.sequence", "use 0"),
        (f"{HYBRID} balance.sequence=0.1 balance.counts=prefix", "balance.counts", "use past or exact"),
        (f"{HYBRID} model.experts.capacity=2", "model.experts.capacity", "use null"),
        ("parallel.ep=4", "parallel.ep", "does not divide the 2 ranks of a pipeline stage"),
        ("parallel.ep=2 model.experts.count=5", "parallel.ep", "5 experts (model.experts.count) can't be dealt to 2 ranks"),
        ("parallel.ep=2 parallel.engine=deepspeed", "parallel.ep", "data-parallel only"),
        ("parallel.pp=2 parallel.schedule=zbv trainer.activation=full", "trainer.activation", "keeps the choice of experts"),
        ("parallel.engine=deepspeed", "parallel.engine", "can't train a mixture of experts"),
        (
            "model.experts.router=recurrent parallel.pp=2 parallel.schedule=zb",
            "parallel.schedule",
            "use parallel.schedule=1f1b",
        ),
        ("model.experts.router=recurrent parallel.pp=2 batch=norm_test", "batch", "recurrent routers share"),
        ("model.experts.state_dim=64", "model.experts.state_dim", "has no state"),
        ("model.experts.router=recurrent model.experts.state_dim=0", "model.experts.state_dim", "is not a size"),
        (f"{RELU} model.experts.capacity=2", "model.experts.capacity", "does not have it"),
        (f"{RELU} model.experts.logit_bias=true", "model.experts.logit_bias", "has no bias"),
        (f"{RELU} model.experts.scores=sigmoid model.experts.bias=true", "model.experts.scores", "does not have it"),
        (f"{RELU} balance.z_loss=0.1", "balance.z_loss", "has no softmax"),
        (f"{RELU} balance.chunk_sparsity=0.1 parallel.tp=2", "balance.chunk_sparsity", "parallel.tp=2 may give"),
        (f"{RELU} balance.locality=0.1 parallel.cp=2", "balance.locality", "parallel.cp=2 may give"),
        (f"{RELU} {HYBRID} balance.locality=0.1", "balance.locality", "parallel.hdp=greedy may give"),
        (f"{RELU} balance.chunk_length=0", "balance.chunk_length", "use 1 or more"),
        ("balance.locality=0.1", "balance.locality", "use model.experts.router=relu"),
        ("model.experts.gated=false", "model.experts.shared", "use 0"),
        ("trainer.activation_budget=0.5", "trainer.activation_budget", "choose trainer.activation"),
    ],
)
def test_keys_that_do_not_fit_a_mixture_are_named(composer: Composer, words: str, key: str, says: str) -> None:
    found = problems_of(composer, 2, "recipe=moe_tiny", *words.split())
    assert says in found[key]


def test_balance_without_a_mixture_is_refused_all_at_once(composer: Composer) -> None:
    words = ("balance.global_batch=0.01", "balance.sequence=0.1", "balance.bias_rate=0.001")
    found = problems_of(composer, 1, "recipe=quickstart", *words)
    assert {"balance.global_batch", "balance.sequence", "balance.bias_rate"} <= found.keys()
