"""A checkpoint whose config names a class runs nothing, unless today's words name that class themselves."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import load_manifest
from meshloom.config.structured import literal
from meshloom.launch.generate import main as generate
from meshloom.trainer.resolve import ResolvedRun
from support.configs import resolve_words
from support.tiny_run import TINY, body


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert body(0, 1, ["trainer.steps=2", f"output_dir={folder}", "trainer.eval_every=0"]) == 0
    return folder


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears if the class of a forged config is called, or its module is imported."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "forged.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef call(*a, **k): pass\n")
    monkeypatch.syspath_prepend(str(package))
    return tmp_path / "ran"


def forge(trained: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a run's step with a changed config, and digests that are right."""
    step = next((trained / "checkpoints").glob("step-*"))
    there = folder / "forged/checkpoints" / step.name
    there.mkdir(parents=True)
    for file in step.iterdir():
        (there / file.name).write_bytes(file.read_bytes())
    manifest = load_manifest(open_files(step))
    state = json.loads(json.dumps(manifest.state))
    change(state["config"])
    (there / "manifest.json").write_bytes(replace(manifest, state=state).encode())
    return there


def resolved(step: Path, *words: str) -> ResolvedRun:
    return resolve_words(TINY, [f"resume={step}", f"output_dir={step.parents[3] / 'out'}", *words], 1)


def at(*path: Any) -> Callable[[Any], Any]:
    """Return what puts a forged node at a place of the config."""

    def put(config: Any) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = {"_target_": "forged.call"}

    return put


FORGERIES: dict[str, Callable[[Any], Any]] = {
    "model": lambda config: config["model"].update(_target_="forged.call"),
    "optim": lambda config: config["optim"].update(_target_="forged.call"),
    "data": lambda config: config["data"].update(_target_="forged.call"),
    "a prefix": lambda config: config["model"].update(_target_="meshloom.models.decoder.torch.os.system"),
    "a moved one": lambda config: config["optim"].update(_target_="meshloom.optim.adamw.torch.os.system"),
    "nested": at("data", "vocabulary"),
    "nested in nested": at("model", "rope_theta"),
    "a source": lambda config: config["data"].update(sources={"a": {"_target_": "forged.call"}}),
    "a validation set": lambda config: config.update(validation={"a": {"_target_": "forged.call"}}),
    "another group's": lambda config: config["model"].update(_target_="meshloom.optim.optimizers.adamw.AdamW"),
    "a hook": lambda config: config["trainer"].update(hooks=[{"_target_": "forged.call"}]),
    "a mixture's part": lambda config: config["model"]["experts"].update(
        count=2, parts={"combine": {"_target_": "forged.call"}}
    ),
    "a key of no group": at("logging", "project"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_class_of_a_checkpoint_runs(trained: Path, tmp_path: Path, mark: Path, name: str) -> None:
    step = forge(trained, tmp_path, FORGERIES[name])
    found = resolved(step)
    assert any("which today's command line and recipe don't" in str(problem) for problem in found.problems), found.problems
    generate([f"checkpoint={step}", "tokens=1", "context=4"])
    assert not mark.exists()


def test_a_config_that_was_not_forged_resumes(trained: Path, tmp_path: Path) -> None:
    assert not resolved(forge(trained, tmp_path, lambda config: None)).problems


def test_a_class_that_todays_words_name_is_taken(trained: Path, tmp_path: Path) -> None:
    hook = {"_target_": "support.run_hooks.Fail", "step": 9}
    step = forge(trained, tmp_path, lambda config: config["trainer"].update(hooks=[hook]))
    (problem,) = resolved(step).problems
    typed = "trainer.hooks=[{_target_: support.run_hooks.Fail, step: 9}]"
    assert problem.key == "trainer.hooks.0" and f"'{typed}'" in str(problem)
    assert not resolved(step, typed).problems
    assert not resolved(step, "trainer.hooks=[]").problems


@pytest.mark.parametrize("target", ["os.system", "meshloom.launch.torchrun.subprocess.run", "torch.os.system"])
@pytest.mark.parametrize("place", [("extra",), ("optim", "nested"), ("trainer", "hooks"), ("optim",)])
def test_a_class_that_suits_no_run_is_never_offered(trained: Path, tmp_path: Path, place: Any, target: str) -> None:
    node = {"_target_": target, "command": "it's"}

    def put(config: Any) -> None:
        *above, last = place
        for key in above:
            config = config[key]
        config[last] = [node] if last == "hooks" else {**config.get(last, {}), **node}

    (problem,) = resolved(forge(trained, tmp_path, put)).problems
    assert target in problem.message and target not in problem.fix and "don't trust" in problem.fix


def test_an_offered_class_can_be_typed(trained: Path, tmp_path: Path) -> None:
    """In a shell, where a value has both kinds of quotation marks."""
    hook = {"_target_": "support.run_hooks.Signal", "step": 9, "rank": 0, "name": "SIG'\"TERM"}
    step = forge(trained, tmp_path, lambda config: config["trainer"].update(hooks=[hook]))
    (problem,) = resolved(step).problems
    word = shlex.split(problem.fix.partition("type ")[2])[0].removesuffix(",")
    assert resolved(step, word).config.trainer.hooks == [hook]


def test_a_model_of_ones_own_generates_when_it_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = forge(trained, tmp_path, lambda config: config["model"].update(_target_="support.user_gpt.GPT"))
    assert generate([f"checkpoint={step}"]) == 2
    assert "type model=support.user_gpt.GPT" in capsys.readouterr().err
    assert generate([f"checkpoint={step}", "model=support.user_gpt.GPT"]) == 2
    assert "names the class" not in capsys.readouterr().err  # on to what comes next: synthetic data has no tokenizer


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a\\${b}", "a\\\\${b}", "$a", "${", "{}"])
def test_a_text_of_a_checkpoint_is_no_interpolation(text: str) -> None:
    config: Any = OmegaConf.create({"a": [literal(text)], "b": 1})
    assert OmegaConf.to_container(config, resolve=True) == {"a": [text], "b": 1}


@pytest.mark.parametrize("group, key", [("model", "init_std"), ("optim", "lr"), ("data", "tokenizer"), ("schedule", "warmup")])
def test_no_text_of_a_checkpoint_reads_the_environment(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, key: str
) -> None:
    monkeypatch.setenv("SECRET", "0.5")
    step = forge(trained, tmp_path, lambda config: config[group].update({key: "${oc.env:SECRET}"}))
    found = resolved(step)
    assert "0.5" not in str([str(problem) for problem in found.problems])
    node = vars(found.config)[group]
    assert node is None or vars(node).get(key) in (None, "${oc.env:SECRET}")


@pytest.mark.parametrize(("key", "value"), [("dim", 160_000), ("layers", 10_000_000)])
def test_a_config_of_more_than_the_arrays_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: int
) -> None:
    step = forge(trained, tmp_path, lambda config: config["model"].update({key: value}))
    (problem,) = resolved(step).problems
    assert f"says model.{key}={value}, and its arrays are of" in str(problem)
    assert generate([f"checkpoint={step}"]) == 2
    assert f"says model.{key}={value}, and its arrays are of" in capsys.readouterr().err
