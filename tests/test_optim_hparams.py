"""`meshloom hparams`, and values that a config leaves to a law."""

from __future__ import annotations

import pytest

from meshloom.config.compose import Composer
from meshloom.launch.hparams import Arguments, main, recommend
from meshloom.trainer.automatic import hidden_parameters, resolve_automatic


def test_recommendations_for_llama_1b() -> None:
    """Llama 1B: 16 layers of 2·2048² (q, o) + 2·2048·512 (k, v) + 3·2048·8192 and two norms; and the final norm."""
    found = recommend(Arguments(model="llama_1b", tokens="100B"))
    assert found.hidden == 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048) + 2048
    assert found.parameters == found.hidden + 2 * 128_256 * 2048
    assert found.rows[0].value == f"{1.79 * found.hidden**-0.713 * 1e11**0.307:.3e}"
    assert found.rows[1].value == "1.108 M tokens\n272 sequences"  # 270.4 of 4,096, to the nearest multiple of 8
    assert found.mup.width == 8
    assert not found.rows[0].extrapolated
    assert recommend(Arguments(model="llama_8b", tokens="1T")).rows[0].extrapolated == "N = 6.98 B, D = 1 T"


@pytest.mark.parametrize("name", ["step_overrides", "power_overrides"])
def test_overrides_can_be_pasted(name: str) -> None:
    overrides = getattr(recommend(Arguments(model="llama_1b", tokens="2B", seq_len=1024)), name)
    composition = Composer().compose(["model=llama_1b", *overrides])
    assert composition.problems == []
    assert composition.config.trainer.tokens == 2_000_000_000
    assert composition.config.batch.samples % 8 == 0


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=llama_1b", "tokens=100B", "loss=2.5"]) == 0
    printed = capsys.readouterr().out
    for text in ("1.664e-03", "arXiv 2503.04715", "2.675 M tokens", "optim.lr=1.664e-03", "m_width 8"):
        assert text in printed
    assert main(["model=llama_1", "tokens=1 mile", "seq_len=0"]) == 2
    refused = capsys.readouterr().err
    assert all(text in refused for text in ("3 problems", "model=llama_1b?", "tokens: '1 mile'", "seq_len: 0"))


def test_automatic_values_become_numbers() -> None:
    overrides = ["model=llama_1b", "data=synthetic", "data.seq_len=2048", "trainer.steps=null", "trainer.tokens=100000000000"]
    config = Composer().compose([*overrides, "optim.lr=auto:step_law", "batch.samples=auto:step_law", "batch.micro=4"]).config
    assert resolve_automatic(config, data_size=8) == []
    assert config.batch.samples == 544  # 1.1077e6 / 2048 = 540.9, to the nearest multiple of 32
    assert config.optim.lr == pytest.approx(1.79 * hidden_parameters(config) ** -0.713 * 1e11**0.307, rel=1e-3)
    resolved = config.copy()
    assert resolve_automatic(config, data_size=8) == [] and config == resolved, "numbers are left alone"


def test_automatic_values_that_have_no_answer() -> None:
    config = Composer().compose(["optim.lr=auto:moon", "batch.samples=auto:step_law"]).config
    assert [problem.key for problem in resolve_automatic(config, 1)] == ["batch.samples", "optim.lr"]
    config.trainer.steps, config.trainer.tokens = None, 10**9
    found = resolve_automatic(config, 1)
    assert [str(problem) for problem in found] == [
        "optim.lr: there is no law 'auto:moon' for a learning rate; write one of auto:step_law, auto:power"
    ]
    config.optim.lr = "fast"
    assert str(resolve_automatic(config, 1)[0]) == "optim.lr: 'fast' is not a number; write one, or auto:step_law"


def test_the_power_schedule_is_not_given_the_power_laws_rate_as_its_cap() -> None:
    length = ["trainer.steps=null", "trainer.tokens=1000000000", "optim.lr=auto:power", "data=synthetic"]
    (problem,) = resolve_automatic(Composer().compose([*length, "schedule=power"]).config, 1)
    assert problem.key == "optim.lr" and "0.02" in problem.fix
    assert resolve_automatic(Composer().compose(length).config, 1) == []
