"""Whole runs: stopped and resumed, on the same and on other layouts, by signal, and by a loss that is no number."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from meshloom.checkpoint.folder import find_latest
from meshloom.checkpoint.lock import FolderLock
from meshloom.checkpoint.restore import read_state
from meshloom.config.problems import ConfigError
from meshloom.data.version import NEWEST
from meshloom.models.decoder import Decoder
from meshloom.optim.optimizers.config import OptimConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import EngineSettings
from meshloom.trainer import run as run_module
from meshloom.trainer.find_checkpoint import is_inside
from meshloom.trainer.machine import RUN_LOCK
from meshloom.trainer.signals import DIVERGED
from support.configs import resolve_words
from support.ranks import run_ranks
from support.tiny_run import ANY_DATA, TINY, body
from support.user_corpus import UserCorpus


def go(ranks: int, folder: Path, *overrides: str) -> None:
    codes = run_ranks(ranks, body, [f"output_dir={folder}", *overrides])
    assert codes == [0] * ranks


def rows(folder: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def digest(step: Path) -> str:
    """Of every array file of a step."""
    files = sorted(step.glob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopping_and_resuming_on_the_same_layout_changes_no_bit(tmp_path: Path, ranks: int) -> None:
    go(ranks, tmp_path / "whole", "trainer.steps=8")
    go(
        ranks,
        tmp_path / "cut",
        "trainer.steps=8",
        "checkpoint.every=3",
        "trainer.hooks=[{_target_:support.run_hooks.Signal,step:3,rank:0,name:SIGTERM}]",
    )
    stopped = rows(tmp_path / "cut", "loss")
    assert max(stopped) < 8
    go(ranks, tmp_path / "cut", "trainer.steps=8", "resume=auto", "trainer.hooks=[]")
    assert rows(tmp_path / "cut", "loss") == rows(tmp_path / "whole", "loss")
    assert rows(tmp_path / "cut", "eval_loss")[8] == rows(tmp_path / "whole", "eval_loss")[8]
    steps = [folder / "checkpoints" / "step-00000008" for folder in (tmp_path / "whole", tmp_path / "cut")]
    assert digest(steps[0]) == digest(steps[1])


def test_four_then_two_then_one_process_go_on_as_one_run(tmp_path: Path) -> None:
    go(1, tmp_path / "whole", "trainer.steps=9")
    go(4, tmp_path / "hops", "trainer.steps=3", "parallel.zero=3")
    for ranks, steps, zero in ((2, 6, 1), (1, 9, 0)):
        go(ranks, tmp_path / "hops", f"trainer.steps={steps}", "resume=auto", f"parallel.zero={zero}")
    expected = rows(tmp_path / "whole", "loss")
    assert rows(tmp_path / "hops", "loss") == pytest.approx(expected, rel=1e-9)
    assert rows(tmp_path / "hops", "eval_loss")[9] == pytest.approx(rows(tmp_path / "whole", "eval_loss")[9], rel=1e-9)


def test_other_optimizer_resumes_weights_only_on_request(tmp_path: Path) -> None:
    go(1, tmp_path / "whole", "trainer.steps=4")
    go(1, tmp_path / "run", "trainer.steps=3")
    other = ["trainer.steps=4", "resume=auto", "optim=adagrad"]
    with pytest.raises(AssertionError, match=r"optim: the checkpoint holds the state of AdamW.*checkpoint\.strict=false"):
        go(1, tmp_path / "run", *other)
    go(1, tmp_path / "run", *other, "checkpoint.strict=false")
    # A step's loss is that of the weights before its update: the same as if nothing had changed.
    assert rows(tmp_path / "run", "loss")[4] == pytest.approx(rows(tmp_path / "whole", "loss")[4], rel=1e-12)


def test_a_batch_size_that_changes_loses_and_repeats_no_sample(tmp_path: Path) -> None:
    go(1, tmp_path / "run", "trainer.steps=8", "batch=stages", "batch.stages='0:8 512:16'", "batch.micro=2")
    sizes = rows(tmp_path / "run", "batch_samples")
    samples = rows(tmp_path / "run", "samples")
    assert sizes == {1: 8, 2: 8, 3: 8, 4: 8, 5: 16, 6: 16, 7: 16, 8: 16}
    assert [samples[step] for step in range(1, 9)] == [8, 16, 24, 32, 48, 64, 80, 96]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_to_one_rank_stops_all_at_one_saved_step(tmp_path: Path, name: str) -> None:
    hook = f"trainer.hooks=[{{_target_:support.run_hooks.Signal,step:2,rank:1,name:{name}}}]"
    go(2, tmp_path, "trainer.steps=50", hook)
    last = max(rows(tmp_path, "loss"))
    assert last < 8
    found = find_latest(tmp_path / "checkpoints")
    assert found is not None and Path(found).name == f"step-{last:08d}"


def test_a_step_that_is_evaluated_and_saved_is_both(tmp_path: Path) -> None:
    go(1, tmp_path, "trainer.steps=6", "trainer.eval_every=2", "checkpoint.every=2", "checkpoint.mode=async")
    assert set(rows(tmp_path, "eval_loss")) == {2, 4, 6}
    assert rows(tmp_path, "checkpoint_saved") == {2: True, 4: True, 6: True}


def test_restarted_job_uses_its_starting_checkpoint_only_once(tmp_path: Path) -> None:
    """`resume=auto:<path>`: first from another run's checkpoint, then from its own."""
    go(1, tmp_path / "trunk", "trainer.steps=2")
    branch = [f"resume=auto:{tmp_path / 'trunk'}", "checkpoint.every=2"]
    go(1, tmp_path / "branch", *branch, "trainer.steps=4")
    assert sorted(rows(tmp_path / "branch", "loss")) == [3, 4]
    go(1, tmp_path / "branch", *branch, "trainer.steps=6")
    assert sorted(rows(tmp_path / "branch", "loss")) == [3, 4, 5, 6]


def test_state_that_belongs_to_one_run_stays_with_it(tmp_path: Path) -> None:
    """A wandb run goes on in a resumed run, wherever its folder is now, but a branch has one of its own."""
    hook = "trainer.hooks=[{_target_:support.run_hooks.Name}]"
    go(1, tmp_path / "trunk", hook, "trainer.steps=2")
    go(1, tmp_path / "branch", hook, "trainer.steps=3", f"resume={tmp_path / 'trunk'}")
    assert (tmp_path / "branch" / "name").read_text() == "branch"
    (tmp_path / "trunk").rename(tmp_path / "moved")
    go(1, tmp_path / "moved", hook, "trainer.steps=3", "resume=auto")
    assert (tmp_path / "moved" / "name").read_text() == "trunk"
    go(1, tmp_path / "moved", hook, "trainer.steps=4", f"resume={tmp_path / 'moved'}")
    assert (tmp_path / "moved" / "name").read_text() == "trunk"


def test_first_metrics_come_at_once_and_later_ones_a_step_late(tmp_path: Path) -> None:
    go(1, tmp_path, "trainer.hooks=[{_target_:support.run_hooks.Arrivals}]", "trainer.steps=4", "trainer.eval_every=0")
    lines = ["begin 1", "row 1", "begin 2", "begin 3", "row 2", "begin 4", "row 3", "row 4"]
    assert (tmp_path / "arrivals").read_text().splitlines() == lines


def test_one_process_per_machine_precompiles_kernels(tmp_path: Path) -> None:
    assert run_ranks(2, asked_to_compile, [f"output_dir={tmp_path}", "trainer.steps=4"]) == [[(2, 16)], []]


def asked_to_compile(rank: int, world_size: int, overrides: list[str]) -> list[tuple[int, int]]:
    """Layers and positions of what this process would have compiled: before it has connected, or there is an error."""
    asked: list[tuple[int, int]] = []

    def start_compiling(model: Decoder, parallel: ParallelConfig, settings: EngineSettings, optim: OptimConfig) -> None:
        asked.append((len(model.block_modules()), settings.seq_len))

    def connect(*_: object) -> None:
        raise ConnectionError

    run_module.start_compiling = start_compiling
    run_module.Mesh = SimpleNamespace(connect=connect)  # type: ignore[assignment]
    with pytest.raises(ConnectionError):
        body(rank, world_size, overrides)
    return asked


@pytest.mark.parametrize("saving", ["checkpoint.every=0", "checkpoint.every=null"])
def test_folder_belongs_to_one_run_at_a_time_saving_or_not(tmp_path: Path, saving: str) -> None:
    folder = tmp_path / "run"
    elsewhere = f"checkpoint.folder={tmp_path / 'checkpoints'}"
    go(1, folder, "trainer.steps=2", elsewhere)
    before = (folder / "metrics.jsonl").read_bytes()
    live = FolderLock(folder, RUN_LOCK)
    words = [f"output_dir={folder}", "trainer.steps=3", elsewhere, saving]
    one, other = run_ranks(2, refused, words)
    assert "output_dir" in one and "another run is writing into this folder" in one and not other
    assert (folder / "metrics.jsonl").read_bytes() == before
    live.release()
    go(2, folder, *words[1:])
    assert list(rows(folder, "loss")) == [1, 2, 3]


def test_checkpoint_folder_of_another_run_is_refused_too(tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path / 'run'}", f"checkpoint.folder={tmp_path / 'checkpoints'}", "trainer.steps=2"]
    go(1, tmp_path / "run", *words[1:])
    before = sorted(tmp_path.rglob("*")), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    live = FolderLock(tmp_path / "checkpoints")
    one, other = run_ranks(2, refused, words)
    assert "checkpoint.folder" in one and "another run is saving into this folder" in one and not other
    assert (sorted(tmp_path.rglob("*")), (tmp_path / "run" / "metrics.jsonl").read_bytes()) == before
    live.release()
    go(2, tmp_path / "run", *words[1:])


def test_checkpoints_may_lie_in_the_runs_own_folder(tmp_path: Path) -> None:
    own = f"checkpoint.folder={tmp_path}"
    go(1, tmp_path, "trainer.steps=2", own)
    go(1, tmp_path, "trainer.steps=3", "resume=auto", own)
    assert list(rows(tmp_path, "loss")) == [1, 2, 3]


@pytest.mark.parametrize(
    ("checkpoint", "folder", "own"),
    [
        ("run/checkpoints/step-00000002", "run/checkpoints", True),
        ("run/checkpoints", "run/checkpoints/", True),
        ("run/../run/checkpoints/step-00000002", "file://{here}/run/checkpoints", True),
        ("link/checkpoints/step-00000002", "run/checkpoints", True),
        ("run/checkpoints-of-another/step-00000002", "run/checkpoints", False),
        ("trunk/checkpoints/step-00000002", "run/checkpoints", False),
        ("memory://bucket/run/step-00000002", "memory://bucket/run/", True),
        ("memory://bucket/run", "memory://bucket/run", True),
        ("memory://bucket/run-2/step-00000002", "memory://bucket/run", False),
        ("run/checkpoints/step-00000002", "memory://bucket/run", False),
    ],
)
def test_whose_checkpoint_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: str, folder: str, own: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert is_inside(checkpoint, folder.format(here=tmp_path)) == own


def test_folders_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    go(1, tmp_path / "unread", "output_dir='~/trunk'", "trainer.steps=2")
    assert sorted(rows(tmp_path / "trunk", "loss")) == [1, 2]
    go(1, tmp_path / "branch", "trainer.steps=3", "resume='auto:~/trunk'", "checkpoint.folder='~/elsewhere'")
    assert find_latest(tmp_path / "elsewhere") is not None


def test_a_checkpoint_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", "auto:nowhere", "s4://bucket/run", "a" * 300, "", "auto:"):
        (problem,) = resolve_words(TINY, [f"output_dir={tmp_path / 'out'}", f"resume='{where}'"]).problems
        assert problem.key == "resume"
        assert ("is empty" in str(problem)) == (where in ("", "auto:"))


def test_a_checkpoint_may_be_named_by_a_file_url(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/elsewhere"
    go(1, tmp_path / "trunk", f"checkpoint.folder={url}", "trainer.steps=2")
    go(1, tmp_path / "branch", f"resume={url}", "trainer.steps=3")
    assert sorted(rows(tmp_path / "branch", "loss")) == [3]


def test_a_damaged_checkpoint_is_refused_by_what_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(1, tmp_path / "run", "trainer.steps=2")
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    (step / "manifest.json").write_text("{")
    places = (("other", f"resume={step}"), ("run", "resume=auto"), ("other", f"resume={step.parent}"))
    for folder, word in places[:2]:
        (problem,) = resolve_words(TINY, [f"output_dir={tmp_path / folder}", word]).problems
        assert problem.key == "resume" and re.search(r"no going on from .*resume=none", str(problem))

    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "manifest.json":
            raise PermissionError(f"{path}: Access Denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    fixes = ("name another one", "move that step out of the folder", "name another step")
    for (folder, word), fix in zip(places, fixes, strict=True):
        (problem,) = resolve_words(TINY, [f"output_dir={tmp_path / folder}", word]).problems
        assert problem.key == "resume"
        assert re.search(f"manifest.json: reading it failed: .*start again once it can be.*, or {fix}", str(problem))


def refused(rank: int, world_size: int, overrides: list[str]) -> str:
    try:
        body(rank, world_size, overrides)
    except ConfigError as error:
        return str(error)
    return ""


TEXT = ["data=text", "data.vocabulary=270", "data.seq_len=8", "data.validation=0.3", "data.separator='\n'", "trainer.steps=2"]


def on_text(tmp_path: Path, words: str, *overrides: str) -> list[str]:
    (tmp_path / "corpus.txt").write_text("\n".join(f"{words} {number} times over" for number in range(90)))
    return [f"output_dir={tmp_path}/run", f"data.input={tmp_path}/corpus.txt", f"data.cache_dir={tmp_path}", *TEXT, *overrides]


def test_going_on_with_other_tokens_is_refused(tmp_path: Path) -> None:
    """The same size of vocabulary, trained on other text: every id would mean something else, and nothing would say so."""
    go(1, tmp_path / "run", *on_text(tmp_path, "green eggs and ham"))
    changed = on_text(tmp_path, "the cat in the hat", "resume=auto", "trainer.steps=3")
    (said,) = run_ranks(1, refused, changed)
    assert "data.tokenizer: " in said and "tokenizer.json" in said
    own = f"data.tokenizer={tmp_path}/run/tokenizer.json"
    assert run_ranks(1, refused, [*changed, own]) == [""]
    assert set(rows(tmp_path / "run", "loss")) == {1, 2, 3}


def test_data_keep_the_rules_that_the_run_began_with(tmp_path: Path) -> None:
    words = "green eggs and ham\r\n"  # line ends that version 1 changed
    go(1, tmp_path / "run", *on_text(tmp_path, words, "data.version=1", "data.tokenizer=bytes"))
    go(1, tmp_path / "run", *on_text(tmp_path, words, "resume=auto", "trainer.steps=3"))
    states = [read_state(tmp_path / f"run/checkpoints/step-0000000{step}") for step in (2, 3)]
    assert states[0]["data_fingerprint"] == states[1]["data_fingerprint"] and states[1]["data_version"] == 1
    go(1, tmp_path / "new", *on_text(tmp_path, words, "data.tokenizer=bytes", f"output_dir={tmp_path}/new"))
    new = read_state(tmp_path / "new/checkpoints/step-00000002")
    assert new["data_version"] == NEWEST and new["data_fingerprint"] != states[0]["data_fingerprint"]


def test_a_users_class_with_newer_rules_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").write_text(
        f"_target_: support.user_corpus.UserCorpus\nname: mine\nfile: {tmp_path}/a.txt\nseq_len: 8\ncache: {tmp_path}\n"
    )
    (tmp_path / "a.txt").write_text("green eggs and ham\n" * 90)
    words = ["data=mine", f"output_dir={tmp_path}/run", "checkpoint.every=2"]

    def on_own_data(rank: int, world_size: int, *more: str) -> int:
        return run_module.run(resolve_words(ANY_DATA, [*words, *more], world_size, str(tmp_path)))

    monkeypatch.setattr(UserCorpus, "rules", 1)
    assert run_ranks(1, on_own_data, "trainer.steps=2") == [0]
    monkeypatch.setattr(UserCorpus, "rules", 2)
    with pytest.raises(AssertionError, match=r"data\.version: the samples of .* hand version=1 to CorpusConfig"):
        run_ranks(1, on_own_data, "trainer.steps=3", "resume=auto")


@pytest.mark.parametrize("change", ["width=24", "depth=2"])
def test_a_users_model_that_has_changed_is_refused(tmp_path: Path, change: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("_target_: support.user_gpt.GPT\nname: mine\nwidth: 16\ndepth: 3\n")
    words = [word for word in TINY if not word.startswith("model.")]

    def own_model(rank: int, world_size: int, *more: str) -> int:
        own = ["model=mine", f"output_dir={tmp_path}/run", "checkpoint.every=2", "trainer.eval_every=0", *more]
        return run_module.run(resolve_words(words, own, world_size, str(tmp_path)))

    assert run_ranks(1, own_model, "trainer.steps=2") == [0]
    with pytest.raises(AssertionError, match=r"resume: .* weights .*weight/.* choose the model whose weights they are"):
        run_ranks(1, own_model, "trainer.steps=3", "resume=auto", "checkpoint.strict=false", f"model.{change}")


def test_model_with_fewer_tokens_than_the_data_is_refused(tmp_path: Path) -> None:
    (said,) = run_ranks(1, refused, on_text(tmp_path, "green eggs", "model.vocabulary=200"))
    assert "model.vocabulary: the model knows 200 tokens, and the data has 2" in said
    assert not (tmp_path / "run").exists()


def test_unreadable_data_is_named_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "well"}\nno json\n')
    line = ["data=jsonl", f"data.input={tmp_path}/broken.jsonl", f"data.cache_dir={tmp_path}", f"output_dir={tmp_path}/run"]
    (said,) = run_ranks(1, refused, [*line, "trainer.steps=2"])
    assert f"data: {tmp_path}/broken.jsonl, line 2: " in said
    assert not (tmp_path / "run").exists()


def test_a_full_cache_is_named_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.txt").write_text("the cat sat on the mat " * 400)
    line = ["data=text", f"data.input={tmp_path}/corpus.txt", f"data.cache_dir={tmp_path}/cache", "data.vocabulary=300"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    (said,) = run_ranks(1, refused, [*line, f"output_dir={tmp_path}/run", "trainer.steps=2"])
    assert f"data: {tmp_path}/cache: No space left on device; make room" in said


def ended(rank: int, world_size: int, overrides: list[str]) -> int | str:
    try:
        return body(rank, world_size, overrides)
    except (OSError, ConfigError) as error:
        return str(error)


@pytest.mark.parametrize(("config", "said", "code"), [(True, "no key", 2), (False, "no room", 1)])
def test_process_that_can_not_start_ends_the_others_quietly(tmp_path: Path, config: bool, said: str, code: int) -> None:
    hook = f"trainer.hooks=[{{_target_:support.run_hooks.Refuse,rank:1,config:{str(config).lower()}}}]"
    first, second, third = run_ranks(3, ended, [f"output_dir={tmp_path}", hook, "batch.samples=12"])
    assert said in str(second)
    assert first == third == code


def test_pending_rows_of_a_finished_run_are_written_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "metrics.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr("os.write", full)
    (said,) = run_ranks(1, ended, [f"output_dir={tmp_path}", "trainer.steps=3"])
    assert "rows could not be written: No space left on device" in str(said)
    assert rows(tmp_path, "loss") == {}
    monkeypatch.undo()
    go(1, tmp_path, "trainer.steps=3", "resume=auto")
    assert sorted(rows(tmp_path, "loss")) == [1, 2, 3] and 3 in rows(tmp_path, "eval_loss")


def warned(rank: int, world_size: int, overrides: list[str]) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("meshloom.trainer").addHandler(handler)
    assert body(rank, world_size, overrides) == 0
    return messages


def told(rank: int, world_size: int, overrides: list[str]) -> list[str]:
    """Return the notices of a run, too."""
    logging.getLogger("meshloom.trainer").setLevel(logging.INFO)
    return warned(rank, world_size, overrides)


def test_a_sample_is_never_of_an_earlier_runs_model(tmp_path: Path) -> None:
    text = on_text(tmp_path, "the cat in the hat", "trainer.steps=2", "trainer.sample_prompt=the", "trainer.sample_tokens=3")
    run_ranks(1, warned, text)
    assert (tmp_path / "run" / "sample.txt").read_text().startswith("the")
    (tmp_path / "run" / "sample.txt").unlink()
    (messages,) = run_ranks(1, warned, [*text, "checkpoint.every=0"])
    assert not (tmp_path / "run" / "sample.txt").exists()
    assert "there will be no sample, because the run saves nothing" in "\n".join(messages)


def test_branch_of_a_finished_run_does_nothing_and_no_sample(tmp_path: Path) -> None:
    text = on_text(tmp_path, "the cat in the hat", "trainer.steps=2", "trainer.sample_prompt=the", "trainer.sample_tokens=3")
    run_ranks(1, warned, text)
    (messages,) = run_ranks(1, warned, [*text, f"output_dir={tmp_path}/branch", f"resume={tmp_path}/run"])
    assert f"no sample, because '{tmp_path}/branch/checkpoints' holds no checkpoint" in "\n".join(messages)
    assert not (tmp_path / "branch" / "sample.txt").exists()


def test_a_run_at_its_end_keeps_the_config_it_trained_with(tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path}", "trainer.steps=2"]
    run_ranks(1, warned, words)
    before = (tmp_path / "config.yaml").read_text()
    (messages,) = run_ranks(1, warned, [*words, "resume=auto", "optim.weight_decay=0.5"])
    assert "the run is at its end already (step 2): nothing is trained" in "\n".join(messages)
    assert (tmp_path / "config.yaml").read_text() == before


def test_the_length_told_counts_past_steps_as_they_were(tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path}", "trainer.eval_every=0"]
    run_ranks(1, told, [*words, "trainer.steps=2"])
    (messages,) = run_ranks(1, told, [*words, "trainer.steps=4", "resume=auto", "batch.samples=16"])
    assert "256 tokens a step (16 samples of 16), 768 in all" in messages


def test_the_length_told_is_the_one_that_is_trained(tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path}", "trainer.steps=null", "trainer.tokens=300", "trainer.eval_every=0"]
    (messages,) = run_ranks(1, told, words)
    assert "128 tokens a step (8 samples of 16), 384 in all (trainer.tokens=300, in whole steps)" in messages
    assert rows(tmp_path, "tokens")[3] == 384 and max(rows(tmp_path, "loss")) == 3


def test_a_batch_that_jumps_on_a_resume_is_a_warning(tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path}", "trainer.eval_every=0", "resume=auto"]
    run_ranks(1, warned, [*words, "trainer.steps=2"])
    ramp = ["batch=ramp", "batch.max=64", "batch.over=10%", "batch.micro=2"]
    (messages,) = run_ranks(1, warned, [*words, "trainer.steps=3", *ramp])
    assert any("the batch has 64 samples from step 3 on, and had 8 before" in message for message in messages)
    (messages,) = run_ranks(1, warned, [*words, "trainer.steps=4"])
    assert not any("the batch has" in message for message in messages)


def test_that_nothing_is_kept_for_validation_is_said(tmp_path: Path) -> None:
    text = on_text(tmp_path, "the cat in the hat", "data.validation=0")
    (messages,) = run_ranks(1, warned, [*text, "trainer.eval_every=1"])
    assert "there will be no evaluation" in "\n".join(messages)
    (messages,) = run_ranks(1, warned, [*text, "trainer.eval_every=0"])
    assert "evaluation" not in "\n".join(messages)


def test_a_folder_that_can_not_be_made_ends_all_processes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = run_ranks(2, ended, [f"output_dir={tmp_path}/file/run", "trainer.steps=2"])
    assert "output_dir: " in str(first) and second == 2


def diverging(rank: int, world_size: int, overrides: list[str]) -> tuple[int, bool]:
    code = body(rank, world_size, overrides)
    return code, (Path(overrides[0].partition("=")[2]) / "checkpoints" / "step-00000004").exists()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_loss_that_is_not_a_number_ends_the_run_unsaved(tmp_path: Path, mode: str) -> None:
    overrides = ["trainer.hooks=[{_target_:support.run_hooks.Poison,step:4}]", f"checkpoint.mode={mode}"]
    results = run_ranks(2, diverging, [f"output_dir={tmp_path}", "trainer.steps=9", "checkpoint.every=2", *overrides])
    assert results == [(DIVERGED, False)] * 2
    found = find_latest(tmp_path / "checkpoints")
    assert found is not None and Path(found).name == "step-00000002"


def fails(rank: int, world_size: int, overrides: list[str]) -> str:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("meshloom.trainer").addHandler(handler)
    assert body(rank, world_size, overrides) == DIVERGED
    return messages[-1]


@pytest.mark.parametrize(("step", "said"), [(2, "Nothing was saved before it"), (4, "Resume from step 2, the newest")])
def test_a_diverged_run_says_where_it_can_go_on(tmp_path: Path, step: int, said: str) -> None:
    words = [f"output_dir={tmp_path}", "trainer.steps=9", "checkpoint.every=2"]
    (message,) = run_ranks(1, fails, [*words, f"trainer.hooks=[{{_target_:support.run_hooks.Poison,step:{step}}}]"])
    assert message.startswith(f"step {step}: loss nan") and said in message


def test_a_save_under_way_is_finished_before_a_diverged_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one to go on from; here the disk is slower than the two steps until the loss is no number."""
    sync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.2)
        sync(descriptor)

    monkeypatch.setattr("os.fsync", slow)
    overrides = ["trainer.hooks=[{_target_:support.run_hooks.Poison,step:4}]", "checkpoint.mode=async", "checkpoint.every=2"]
    assert run_ranks(2, diverging, [f"output_dir={tmp_path}", "trainer.steps=9", *overrides]) == [(DIVERGED, False)] * 2
    assert str(find_latest(tmp_path / "checkpoints")).endswith("step-00000002")
