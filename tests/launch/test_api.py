"""The Python API: runs, models and exports by calls, with values in place of words."""

from __future__ import annotations

import gc
import logging
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import meshloom
from meshloom.launch.api import override_words
from meshloom.launch.generate import GenerateArguments, load_speaker
from meshloom.launch.nodes.refusals import read_refusals
from meshloom.launch.nodes.terms import meeting_folder
from meshloom.trainer.schema import make_composer
from support.tiny_run import TINY

TYPED = [*TINY, "checkpoint.every=2", "schedule=constant"]
OPTIM = {"lr": 2e-3, "betas": (0.9, 0.99)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> meshloom.Run:
    """A run of three steps, of which the third is taken after a stop and with other micro-batches."""
    folder = tmp_path_factory.mktemp("api") / "run"
    meshloom.train(*TYPED, output_dir=folder, optim=OPTIM, trainer={"steps": 2})
    return meshloom.train(*TYPED, "resume=auto", output_dir=folder, trainer={"steps": 3}, batch={"micro": 4})


def test_values_become_the_words_that_read_back_the_same() -> None:
    keys = {"optim": {"lr": 1e-5, "betas": (0.9, 0.99)}, "output_dir": Path("a b/it's=1"), "trainer.hooks": [], "seed": 3}
    more = {"precision": "bf16", "trainer": {"sample_prompt": None, "compile": True, "eval_every": "10%"}}
    config = make_composer().compose(["recipe=quickstart", *override_words(keys | more)]).config
    assert (config.optim.lr, list(config.optim.betas), config.output_dir) == (1e-5, [0.9, 0.99], "a b/it's=1")
    assert (config.seed, config.precision, config.trainer.sample_prompt) == (3, "bf16", None)
    assert (config.trainer.compile, config.trainer.eval_every, list(config.trainer.hooks)) == (True, "10%", [])
    measured = {"optim": {"lr": np.float32(0.5), "betas": (np.float64(0.9), np.array(0.99))}, "seed": np.int64(3)}
    assert override_words(measured) == ["optim.lr=0.5", "optim.betas=[0.9,0.99]", "seed=3"]
    assert override_words({"precision": "32"}) == ["precision='32'"]  # a text stays one
    hooks = ({"_target_": "mine.Hook", "every": np.int64(3), "names": ["it's", "Zürich"], "more": {"a.b": {}, "c": None}},)
    config = (
        make_composer().compose(["recipe=quickstart", *override_words({"output_dir": "é", "trainer": {"hooks": hooks}})]).config
    )
    assert config.output_dir == "é" and list(config.trainer.hooks) == [{**hooks[0], "every": 3}]
    with pytest.raises(meshloom.ConfigError, match=r"trainer\.hooks: .* is no value of a config"):
        override_words({"trainer": {"hooks": [{"a: b": 1}]}})
    with pytest.raises(meshloom.ConfigError, match=r"optim\.lr: tensor\(1\.\) is no value of a config"):
        override_words({"optim": {"lr": torch.tensor(1.0)}})


def test_a_run_has_its_metrics_config_and_checkpoints(run: meshloom.Run) -> None:
    steps, losses = run.metrics["loss"]
    assert steps.tolist() == [1, 2, 3] and losses.dtype == "float64" and (losses > 0).all()
    assert run.metrics["eval_loss"][0].tolist() == [2, 3]  # an evaluation ends each start
    assert run.config["optim"]["lr"] == 2e-3 and run.config["optim"]["betas"] == [0.9, 0.99]
    assert [Path(each).name for each in run.checkpoints] == ["step-00000002", "step-00000003"]
    assert run.incidents == []
    assert meshloom.Run.open(str(run.folder)).metrics.rows == run.metrics.rows
    assert len(run.metrics["absent"][0]) == 0


def test_a_run_that_went_on_has_the_losses_of_one_that_did_not_stop(run: meshloom.Run, tmp_path: Path) -> None:
    whole = meshloom.train(*TYPED, output_dir=tmp_path / "whole", optim=OPTIM, trainer={"steps": 3})
    assert run.metrics["loss"][1] == pytest.approx(whole.metrics["loss"][1], rel=1e-9)  # in float64


def test_a_model_is_loaded_as_it_was_saved(run: meshloom.Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model, tokenizer, config = meshloom.load(run.checkpoints[-1], dtype=torch.float64)
    assert tokenizer is None and "which has no text" in caplog.text  # synthetic tokens
    assert config["model"]["dim"] == 16 and not model.training
    logits_BSV = model(torch.zeros(2, 5, dtype=torch.int64))
    assert logits_BSV.shape == (2, 5, 61) and logits_BSV.dtype == torch.float64
    assert {name: weight.shape for name, weight in run.load().model.named_parameters()} == {
        name: weight.shape for name, weight in model.named_parameters()
    }
    with pytest.raises(meshloom.ConfigError, match="which has no text"):
        load_speaker(GenerateArguments(checkpoint=str(run.folder)))


def test_an_exported_model_has_the_weights_of_the_loaded_one(run: meshloom.Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = meshloom.export(run.folder, tmp_path / "hf", dtype="fp32")
    stored = load_file(folder / "model.safetensors")
    model = meshloom.load(run.folder).model
    torch.testing.assert_close(stored["model.embed_tokens.weight"], model.get_parameter("embed.weight"), rtol=0, atol=0)


def test_an_impossible_run_raises_before_anything_is_touched(tmp_path: Path) -> None:
    with pytest.raises(meshloom.ConfigError) as caught:
        meshloom.train("recipe=quickstart", parallel={"zero": 7}, precision="half", output_dir=tmp_path / "run")
    assert [problem.key for problem in caught.value.problems] == ["precision", "parallel.zero"]
    assert not (tmp_path / "run").exists()
    folder = meeting_folder(tmp_path / "run")
    folder.mkdir(parents=True)
    launch = {"nodes": "1:2", "nproc": 1, "placements": {1: ["parallel.tp=7"]}}
    for keys, key in (({}, "launch.placements.1: parallel"), ({"precision": "half"}, "precision")):
        with pytest.raises(meshloom.ConfigError) as caught:
            meshloom.train(*TYPED, launch=launch, output_dir=tmp_path / "run", **keys)
        assert caught.value.problems[0].key == key
        (told,) = read_refusals(folder)  # for the other machines
        assert key in told
    with pytest.raises(meshloom.ConfigError, match=r"is no run: it has no config\.yaml"):
        meshloom.Run.open(tmp_path)
    with pytest.raises(meshloom.ConfigError, match="checkpoint"):
        meshloom.load(tmp_path)


def test_a_diverged_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(meshloom.TrainingFailed, match="exit code 77") as caught:
        meshloom.train(*TYPED, output_dir=tmp_path / "run", optim={"lr": 1e300}, schedule={"warmup": 0})
    assert caught.value.folder == tmp_path / "run"


def test_a_run_that_was_asked_to_stop_has_not_finished(tmp_path: Path) -> None:
    hook = "trainer.hooks=[{_target_:support.run_hooks.Signal,step:2,rank:0,name:SIGUSR1}]"
    with pytest.raises(meshloom.TrainingStopped, match="asked to stop by SIGUSR1") as caught:
        meshloom.train(*TYPED, hook, output_dir=tmp_path / "run", trainer={"steps": 50})
    assert caught.value.number == signal.SIGUSR1
    assert 2 <= meshloom.Run.open(caught.value.folder).metrics["loss"][0][-1] < 50


class Ring:
    """An object that only a collection frees, as those of a run."""

    def __init__(self) -> None:
        self.itself = self


def test_memory_is_collected_before_it_is_asked_and_after_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rings = [weakref.ref(Ring())]
    seen: list[bool] = []

    def asked(resolved: object) -> list[object]:
        seen.append(rings[0]() is None)
        return []

    def fails(*_: object) -> int:
        rings.append(weakref.ref(Ring()))
        raise OSError("lost")

    monkeypatch.setattr("meshloom.launch.train.start_problems", asked)
    monkeypatch.setattr("meshloom.trainer.run.run", fails)
    gc.disable()
    try:
        with pytest.raises(OSError, match="lost"):
            meshloom.train(*TYPED, output_dir=tmp_path / "run")
    finally:
        gc.enable()
    assert seen == [True] and rings[1]() is None


def test_only_a_main_thread_trains(tmp_path: Path) -> None:
    found: list[str] = []

    def body() -> None:
        try:
            meshloom.train(*TYPED, output_dir=tmp_path / "run")
        except RuntimeError as error:
            found.append(str(error))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found and "main thread" in found[0]


def test_importing_meshloom_imports_nothing_else() -> None:
    program = "import sys, meshloom; print(*[n for n in sys.modules if n.partition('.')[0] in ('torch', 'numpy', 'hydra')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
    assert set(meshloom.__all__) <= set(dir(meshloom)) and all(getattr(meshloom, name) for name in meshloom.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        _ = meshloom.fit
