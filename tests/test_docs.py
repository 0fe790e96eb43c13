"""Files, commands and config keys that the documents name exist, and their command lines compose."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig

from meshloom.config.keys import keys_of
from meshloom.config.overrides import OPEN_NODES
from meshloom.launch.cli import COMMANDS
from meshloom.models.costs import parameter_count
from meshloom.planner.cluster import is_cluster_word, load_cluster
from meshloom.trainer.resolve import compose_config
from meshloom.trainer.run import run
from meshloom.trainer.schema import OPTIONS, make_composer
from support.configs import resolve_words
from support.documents import DOCUMENTS, ROOT, write_examples
from support.tiny_run import TINY

FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|md|yaml|sh|sbatch|toml)|(?:[\w-]+/)+")
THE_USERS = ("my/", "mine/", "outputs/")  # folders that the examples make
UNITS = {"B": 1e9, "M": 1e6}
KEYS = {"launch.sbatch"}  # that look like files


def named_in(text: str) -> Iterator[str]:
    """Return what stands in backticks, and the targets of links."""
    yield from re.findall(r"`([^`\n]+)`", text)
    yield from (target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target)


@cache
def tails() -> frozenset[str]:
    """The paths of all files and folders of the tree, and their ends: `a/b.py`, `b.py`. Folders end in a slash."""
    found: set[str] = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".")]  # .venv has more files than all others
        inside = Path(folder).relative_to(ROOT).parts
        for name in (*(f"{name}/" for name in folders), *(name for name in files if not name.startswith("."))):
            found |= {"/".join((*inside[start:], name)) for start in range(len(inside) + 1)}
    return frozenset(found)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    named = {name for name in named_in(text) if FILE.fullmatch(name) and not name.startswith(THE_USERS)} - KEYS
    folder = document.parent.relative_to(ROOT)
    absent = [
        name
        for name in sorted(named)
        # From the root, or beside the document; a name alone, or a folder's tail, may lie anywhere.
        if not (ROOT / folder / name).exists() and name not in tails()
    ]
    assert absent == []


def command_lines(document: Path) -> Iterator[str]:
    """`meshloom …` as a person would type it: in blocks and in backticks, without comments, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", document.read_text())
    for line in text.splitlines():
        typed = re.match(r"(?:    |\$ )*(meshloom [a-z].*?)(?:\s{2,}.*|\s+#.*|\s*>.*)?$", line)
        if typed:
            yield typed[1]
    yield from (name for name in named_in(text) if name.startswith("meshloom "))


LINES = [
    pytest.param(line, id=f"{document.name}: {line[:70]}")
    for document in DOCUMENTS
    for line in dict.fromkeys(command_lines(document))
    if not re.search(r"[<…]|PATH", line)
]


def with_folder(words: list[str]) -> bool:
    """Return whether a command line names a folder of recipes, which only its page's own test has."""
    return any(word.partition("=")[0] == "--config-dir" for word in words)


@pytest.mark.parametrize("line", LINES)
def test_commands_exist_and_their_configs_compose(line: str, tmp_path: Path) -> None:
    _, command, *words = shlex.split(line)
    if command.startswith("--"):
        return
    assert command in COMMANDS
    refused = "optim.lrr" in line  # the README's own example of a config that is refused
    if command not in ("train", "plan", "tune", "slurm") or with_folder(words) or refused:
        return
    if "submitit" in line:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pip install 'meshloom[submitit]'")
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    if cluster := [word for word in overrides if is_cluster_word(word)]:
        load_cluster(cluster)
        overrides = [word for word in overrides if word not in cluster]
    composer = make_composer()
    for job in composer.expand(overrides):
        assert composer.compose(job).problems == []


def test_subcommands_that_are_named_exist(capfd: pytest.CaptureFixture[str]) -> None:
    """`meshloom checkpoint …` and `meshloom data …` have subcommands of their own; their help lists them."""
    from meshloom.launch import checkpoint, data

    texts = " ".join(document.read_text() for document in DOCUMENTS)
    for name, module in (("checkpoint", checkpoint), ("data", data)):
        assert module.main(["--help"]) == 0
        help_text = capfd.readouterr().out
        named = set(re.findall(rf"meshloom {name} ([a-z]+)", texts))
        assert named and all(re.search(rf"\b{subcommand}\b", help_text) for subcommand in named)


@cache
def every_key() -> frozenset[str]:
    """Every config key of any option of any group, and the nodes that hold them."""
    keys: set[str] = set()

    def walk(node: DictConfig, prefix: str) -> None:
        for name, value in node.items_ex(resolve=False):
            keys.add(f"{prefix}{name}")
            if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
                walk(value, f"{prefix}{name}.")

    walk(make_composer().compose([]).config, "")
    for group, kinds in OPTIONS.items():
        for names in (key.name.split(".") for kind in kinds for key in keys_of(kind)):
            keys |= {".".join((group, *names[:length])) for length in range(1, len(names) + 1)}
    return frozenset(keys)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_that_are_named_exist(document: Path) -> None:
    known = every_key()
    groups = {key.partition(".")[0] for key in known}
    words = {word for name in named_in(document.read_text()) for word in re.split(r"[\s,]+", name)}
    keys = {match[1] for word in words if (match := re.fullmatch(r"((?:\w+\.)+\w+)(=.*)?", word))}
    named = {key for key in keys if key.partition(".")[0] in groups and not FILE.fullmatch(key)}
    absent = {key for key in named if key not in known and not key.startswith(OPEN_NODES)}
    assert absent == set()


COUNT = re.compile(
    r"([\d.]+) ([BM]) parameters(?:[^,:]*, (?:of which a token passes )?([\d.]+) ([BM])( without the embedding| active|))?"
)
"""Parameters, and those that are active, as texts tell them."""


def told_counts(name: str, text: str) -> list[tuple[str, str]]:
    """Pair the counts of parameters that a text tells of a model with those that its config has. name: its word."""
    found = COUNT.search(text)
    if found is None:
        return []
    model = compose_config(["recipe=quickstart", name])[0]
    shape = replace(model.model.decoder(), vocabulary=model.model.vocabulary or model.data.known_vocabulary)
    whole, unit, active, its_unit, which = found.groups()
    counts = [(whole, unit, parameter_count(shape))]
    if active:
        counts.append((active, its_unit, parameter_count(shape, active=True, embedding="without" not in which)))
    return [(told, f"{count / UNITS[unit]:.{len(told.partition('.')[2])}f}") for told, unit, count in counts]


def test_counts_of_parameters_are_those_of_the_models() -> None:
    recipes = {f"model={file.stem}": file.read_text().partition("\ndim")[0] for file in (ROOT / "recipes/model").glob("*.yaml")}
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    readme = {f"recipe={name}": text for name, text in rows}
    counts = {word: told_counts(word, text) for word, text in {**recipes, **readme}.items()}
    assert sum(map(bool, counts.values())) > 30 and sum(len(each) == 2 for each in counts.values()) > 8
    assert [(word, *pair) for word, found in counts.items() for pair in found if pair[0] != pair[1]] == []


def test_the_readme_lists_every_extra() -> None:
    table = re.search(r"extras_require=\{(.*?)\n    \}", (ROOT / "setup.py").read_text(), re.S)
    assert table is not None
    extras = set(re.findall(r'^        "(\w+)": \[', table[1], re.M))
    assert extras and extras == set(re.findall(r"`\[(\w+)\]`", (ROOT / "README.md").read_text()))


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    texts = "\n".join(document.read_text() for document in DOCUMENTS)
    named = set(re.findall(r"(?:`|^ {4})make ([a-z]+)", texts, re.M))
    assert named and named <= targets


def test_benchmarks_of_the_table_exist() -> None:
    table = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "benchmarks" / "README.md").read_text(), re.M)
    assert table and [name for name in table if not (ROOT / "benchmarks" / name).exists()] == []


def test_the_recipe_of_the_tutorial_composes(tmp_path: Path) -> None:
    write_examples((ROOT / "docs/tutorial.md").read_text(), tmp_path)
    composer = make_composer(str(tmp_path / "mine"))
    assert composer.compose(["recipe=my_1b"]).config.model.vocabulary == 32_000
    typed = [shlex.split(line)[1:] for line in command_lines(ROOT / "docs/tutorial.md") if "…" not in line]
    lines = [words for command, *words in typed if command in ("train", "plan", "slurm") and with_folder(words)]
    assert len(lines) > 5
    for words in lines:
        overrides = [word for word in words if "=" in word and not word.startswith("-") and not is_cluster_word(word)]
        assert "recipe=my_1b" in overrides and composer.compose(overrides).problems == []


def test_examples_in_contributing_train_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples((ROOT / "CONTRIBUTING.md").read_text(), tmp_path)
    mine = str(tmp_path / "mine")
    monkeypatch.syspath_prepend(mine)
    assert not resolve_words(["recipe=quickstart", "data=synthetic"], ["model=llama_wide"], config_dir=mine).problems
    words = ["optim=lion", "optim.lr=3e-4", f"output_dir={tmp_path}/run", "resume=auto"]
    for steps in (2, 3):
        assert run(resolve_words(TINY, [*words, f"trainer.steps={steps}"], config_dir=mine)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
