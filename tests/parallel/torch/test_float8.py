"""Float8 products: same names, losses near bf16's, and what can't have them is refused by key."""

from __future__ import annotations

import pytest
import torch

from meshloom.config.problems import ConfigError
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.limits import float8_problems
from meshloom.parallel.torch.float8 import use_float8
from meshloom.trainer.config import TrainerConfig
from support.models import decoder

SHAPE = {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 96, "vocabulary": 61}


@pytest.mark.parametrize(
    ("recipe", "parallel", "precision", "word"),
    [
        ("rowwise", ParallelConfig(), "fp32", "precision=bf16"),
        ("tensorwise", ParallelConfig(engine="deepspeed"), "bf16", "parallel.engine=torch"),
        ("tensorwise", ParallelConfig(tp=2), "bf16", "parallel.tp=1"),
    ],
)
def test_a_run_that_cant_have_float8_is_refused(recipe: str, parallel: ParallelConfig, precision: str, word: str) -> None:
    found = [problem for problem in float8_problems(recipe, parallel, precision) if "torchao" not in problem.message]
    assert len(found) == 1
    assert found[0].key == "trainer.float8" and word in str(found[0])


def test_a_value_that_is_no_float8_recipe_is_refused() -> None:
    (problem,) = TrainerConfig(steps=1, float8="blockwise").problems()
    assert problem.key == "trainer.float8" and "blockwise" in str(problem)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_loss_and_gradients_are_near_bf16(recipe: str) -> None:
    pytest.importorskip("torchao", reason="needs the extra: pip install 'meshloom[float8]'")
    torch.manual_seed(0)
    model = decoder(**SHAPE).bfloat16()
    tokens = torch.randint(0, 61, (2, 17))

    def gradients() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        return loss.item(), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}

    loss, expected = gradients()
    use_float8(model.layers.values(), recipe, torch.device("cpu"))
    near_loss, near = gradients()
    assert near_loss != loss, "the products are other ones"
    assert near_loss == pytest.approx(loss, rel=1e-2)
    assert near.keys() == expected.keys()
    for name, gradient in near.items():
        assert (gradient - expected[name]).norm() < 0.15 * expected[name].norm(), name
    assert type(model.head) is torch.nn.Linear


def test_sizes_that_the_units_cant_take_are_named() -> None:
    pytest.importorskip("torchao", reason="needs the extra: pip install 'meshloom[float8]'")
    with torch.device("meta"):
        model = decoder(**{**SHAPE, "ffn_dim": 90})
    with pytest.raises(ConfigError, match=r"ffn\.w1 is 90 × 64"):
        use_float8(model.layers.values(), "tensorwise", torch.device("cpu"))
