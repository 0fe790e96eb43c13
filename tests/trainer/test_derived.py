"""Values derived from a config by arithmetic."""

from __future__ import annotations

import pytest

from meshloom.config.duration import Duration, Unit
from meshloom.trainer.config import TrainerConfig
from meshloom.trainer.derived import build_horizon, checkpoint_folder, run_length
from support.configs import config_of


def test_the_length_is_in_the_unit_in_which_it_is_given() -> None:
    assert run_length(TrainerConfig(steps=7)) == Duration(7, Unit.STEPS)
    assert run_length(TrainerConfig(tokens=10**9)) == Duration(10**9, Unit.TOKENS)


@pytest.mark.parametrize(("batch", "tokens"), [("fixed", 20 * 4 * 64), ("ramp", None)])
def test_a_step_is_worth_tokens_only_at_one_batch(batch: str, tokens: int | None) -> None:
    config = config_of("recipe=quickstart", "trainer.steps=20", f"batch={batch}", "batch.samples=4", "batch.micro=2")
    horizon = build_horizon(config, 64)
    assert (horizon.total, horizon.unit, horizon.seq_len) == (20, Unit.STEPS, 64)
    if tokens is None:
        with pytest.raises(ValueError, match="while the batch size changes"):
            horizon.amount(horizon.length, Unit.TOKENS)
    else:
        assert horizon.amount(horizon.length, Unit.TOKENS) == tokens


def test_checkpoints_lie_in_the_runs_folder_or_where_it_says() -> None:
    assert checkpoint_folder(config_of("recipe=quickstart", "output_dir=out")) == "out/checkpoints"
    elsewhere = config_of("recipe=quickstart", "output_dir=out", "checkpoint.folder='s3://bucket/run'")
    assert checkpoint_folder(elsewhere) == "s3://bucket/run"
