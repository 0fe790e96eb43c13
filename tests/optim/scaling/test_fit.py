"""`meshloom fit` on run folders whose losses were made from known laws: the laws come back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from meshloom.config.problems import ConfigError
from meshloom.launch.fit import main
from meshloom.launch.fit_runs import fit_all, read_runs
from meshloom.optim.scaling import laws
from meshloom.trainer.automatic import hidden_parameters
from meshloom.trainer.schema import make_composer
from meshloom.trainer.sides import annotated_yaml
from meshloom.trainer.typed import typed_config

SEQ_LEN = 256


@pytest.fixture(scope="module")
def plain() -> Any:
    return make_composer().compose(["recipe=quickstart", "data=synthetic", f"data.seq_len={SEQ_LEN}"]).config


def write(folder: Path, config: Any, losses: list[float], samples: int, *, annotated: bool = False, **changes: Any) -> Path:
    """Write a run folder as the trainer leaves it: one row a step. annotated: with its comments, which takes the most time"""
    config = config.copy()
    config.trainer.steps = len(losses)
    config.batch.samples = samples
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    folder.mkdir(parents=True)
    text = annotated_yaml(typed_config(config)[0]) if annotated else OmegaConf.to_yaml(config)
    (folder / "config.yaml").write_text(text)
    rows = [
        {"step": i, "loss": loss, "batch_samples": samples, "tokens": i * samples * SEQ_LEN, "tokens_per_second": 1.0}
        for i, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_sweeps_give_back_the_step_law_and_the_loss_law(tmp_path: Path, plain: Any) -> None:
    """Three sizes × three lengths × three learning rates, losses a parabola around its rate, on L(N, D).

    The first sweep has two rates more, at which training fails: the vertex is that of the best rate and its neighbours.
    """
    for layers in (2, 4, 8):
        model = plain.copy()
        model.model.layers = layers
        n = hidden_parameters(typed_config(model)[0])
        for steps in (20, 40, 80):
            d = steps * 32 * SEQ_LEN
            best = laws.step_law_lr(n, d)
            failing = (0.05, 20.0) if (layers, steps) == (2, 20) else ()
            for number, ratio in enumerate((0.3, 1.1, 4.0, *failing)):
                loss = 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28 + 0.05 * math.log(ratio) ** 2
                loss += 3.0 if ratio in failing else 0.0
                folder = tmp_path / f"{layers}-{steps}-{number}"
                write(folder, model, [loss] * steps, 32, optim__lr=best * ratio)
    fits = fit_all(read_runs([tmp_path]))
    assert fits.lr is not None and fits.loss is not None
    assert fits.lr.exponents == pytest.approx({"N": -0.713, "D": 0.307}, rel=1e-6)
    assert fits.lr.constant == pytest.approx(1.79, rel=1e-6)
    # the best of the rates tried lies at 1.1 of the optimum, 0.05 · ln²1.1 above its loss
    found = (fits.loss.floor, fits.loss.n_power, fits.loss.d_power)
    assert found == pytest.approx((1.69 + 0.05 * math.log(1.1) ** 2, 0.34, 0.28), rel=0.02)
    assert "all else equal" in fits.missing["batch"] and "two batch sizes" in fits.missing["critical batch"]


def test_curves_give_back_the_critical_batch(tmp_path: Path, plain: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves of Kaplan's law at four batches, written as runs; the command prints, draws and writes what it fitted."""
    law = laws.LossLaw(b_scale=2.1e6, b_power=0.21, s_scale=10.0)
    for samples in (4, 16, 64, 256):
        losses = [law.loss(1e8, step, samples * SEQ_LEN) for step in range(1, 1200)]
        write(tmp_path / f"runs/{samples}", plain, losses, samples, annotated=True)
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "fits")]) == 0
    written = json.loads((tmp_path / "fits/fit.json").read_text())
    assert written["critical_batch"]["exponents"]["L"] == pytest.approx(-1 / 0.21, rel=0.05)
    for level, batch in written["critical_batch_at"].items():
        assert batch == pytest.approx(laws.critical_batch(float(level), 2.1e6, 0.21), rel=0.05)
    assert (tmp_path / "fits/fit.png").stat().st_size > 10_000 and (tmp_path / "fits/fit.svg").exists()
    printed = capsys.readouterr().out
    assert "batch=critical_loss batch.tokens=" in printed and "learning rate: not fitted" in printed


def test_a_step_taken_again_counts_once_and_a_cut_end_is_passed_over(tmp_path: Path, plain: Any) -> None:
    whole, again = write(tmp_path / "whole", plain, [3.0, 2.0, 1.0], 8), write(tmp_path / "again", plain, [3.0, 2.0, 1.0], 8)
    first, *others = (again / "metrics.jsonl").read_text().splitlines()
    repeated = [json.dumps(json.loads(line) | {"loss": 9.0}) for line in others]
    (again / "metrics.jsonl").write_text("\n".join([first, *repeated, *others, '{"step": 4, "lo']))
    one, other = read_runs([whole, again])
    assert one.curve[0].tolist() == other.curve[0].tolist() == [1, 2, 3]
    assert one.curve[1].tolist() == other.curve[1].tolist() and one.loss == other.loss == 1.0


def test_a_damaged_line_within_is_refused(tmp_path: Path, plain: Any) -> None:
    run = write(tmp_path / "run", plain, [3.0, 2.0, 1.0], 8)
    first, _, last = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([first, '{"step": 2, "lo', last]))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is damaged: line 2"):
        read_runs([run])


def test_runs_that_cannot_be_read_are_named(tmp_path: Path, plain: Any, capsys: pytest.CaptureFixture[str]) -> None:
    good, short, broken = (tmp_path / name for name in ("good", "short", "broken"))
    write(good, plain, [3.0, 2.0], 8)
    write(short, plain, [3.0, 2.0], 8)
    config = (short / "config.yaml").read_text()
    (short / "config.yaml").write_text(config.replace("steps: 2", "steps: 9"))
    write(broken, plain, [3.0], 8)
    (broken / "metrics.jsonl").write_text("{")
    (tmp_path / "empty").mkdir()
    assert main([str(good), "--varies", "seed", *(str(tmp_path / name) for name in ("short", "broken", "empty"))]) == 2
    refused = capsys.readouterr().err
    assert "short: can't be read as a finished run: it stopped at 2 of 9 steps" in refused
    assert "broken: can't be read" in refused and "empty: holds no run" in refused and "3 problems" in refused
    assert main([str(good)]) == 1, "one run fits nothing"
    (short / "config.yaml").write_text("trainer: [")
    assert main([str(short)]) == 2, "a file that is no YAML"
    assert main([str(good), "--output", str(broken / "metrics.jsonl")]) == 1, "a file where the folder should be"
    assert "meshloom fit: " in capsys.readouterr().err


def test_an_optimum_at_the_edge_is_not_used(tmp_path: Path, plain: Any) -> None:
    for number, rate in enumerate((1e-3, 2e-3, 4e-3)):
        write(tmp_path / str(number), plain, [3.0 - number] * 4, 8, optim__lr=rate)
    fits = fit_all(read_runs([tmp_path]))
    assert fits.lr is None and "at an edge" in fits.missing["learning rate"]
    assert main([str(tmp_path)]) == 1, "nothing was found"


def test_one_sweep_with_its_optimum_inside_is_a_result(tmp_path: Path, plain: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A law takes several sweeps; the best rate of one is what its owner wants to know. Here it is where the parabola says."""
    for rate in (1e-3, 2e-3, 4e-3):
        write(tmp_path / str(rate), plain, [3.0 + math.log(rate / 2e-3) ** 2] * 4, 8, optim__lr=rate)
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "best learning rate" in said and ": 0.002, loss 3.0000" in said and "in one setting only" in said


def test_a_run_whose_last_step_has_no_row_is_finished(tmp_path: Path, plain: Any) -> None:
    """With logging.every=10 only the evaluation knows of the last steps; without one the run counts as stopped.

    A line that a crash has cut is passed over.
    """
    folder = write(tmp_path / "run", plain, [5.0] * 25, 8)
    kept = (folder / "metrics.jsonl").read_text().splitlines()[9::10]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
    with pytest.raises(ConfigError, match="it stopped at 20 of 25 steps"):
        read_runs([tmp_path])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 25, "eval_loss": 4.5, "tokens": 25 * 8 * SEQ_LEN}) + "\n" + '{"step": 26, "eval_l')
    (run,) = read_runs([tmp_path])
    assert run.tokens == 25 * 8 * SEQ_LEN and run.loss == 4.5


def test_runs_that_differ_in_anything_else_are_not_merged(tmp_path: Path, plain: Any) -> None:
    """AdamW's optimum must not vanish behind LARS's."""
    write(tmp_path / "a", plain, [2.0, 1.0], 32, seed=1)
    write(tmp_path / "b", plain, [2.0, 1.1], 32, optim__lr=0.1, seed=2)
    other = make_composer().compose(["recipe=quickstart", "data=synthetic", f"data.seq_len={SEQ_LEN}", "optim=lars"]).config
    write(tmp_path / "c", other, [2.0, 0.9], 32)
    with pytest.raises(ConfigError) as refusal:
        read_runs([tmp_path])
    keys = {problem.key for problem in refusal.value.problems}
    assert {"seed", "optim.name", "optim.momentum"} <= keys and not keys & {"optim.lr", "trainer.steps"}
    assert "adamw (2 runs), lars (1 run)" in str(refusal.value)
    assert len(read_runs([tmp_path / "a", tmp_path / "b"], ["seed"])) == 2
