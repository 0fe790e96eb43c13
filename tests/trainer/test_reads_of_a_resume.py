"""The files that ranks of a host open or list at a start and on a resume: counted, as Python's audit events tell."""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from meshloom.launch import rank as launched
from support.composing import compose_anew
from support.ranks import run_ranks
from support.tiny_run import ANY_DATA

RANKS = 4
CORPUS = ["data=text", "data.tokenizer=bpe", "data.vocabulary=300", "data.validation=0.2", "data.packing=bestfit"]
RECIPES = "recipes/"


def started(rank: int, world_size: int, folder: str, words: list[str]) -> dict[str, int]:
    """Run a command line as torchrun starts it. Returns file or folder → how often this rank has opened or listed it.

    Those are named that lie in the folder, and recipes.
    """
    attempt = Path(folder) / f"attempt_of_{world_size}"
    (attempt / str(rank)).mkdir(parents=True, exist_ok=True)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(attempt / str(rank) / "error.json")
    asked: Counter[str] = Counter()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if arguments else ""
        if event not in ("open", "os.scandir", "os.listdir") or str(attempt) in path:
            return
        if folder in path:
            asked[path.removeprefix(f"{folder}/")] += 1
        elif path.endswith(".yaml"):
            asked[f"{RECIPES}{Path(path).name}"] += 1

    compose_anew()  # where an earlier test has composed these recipes, they would not be read again
    sys.addaudithook(note)
    assert launched.main(words) == 0
    return dict(asked)


def check_others(found: list[dict[str, int]]) -> None:
    """Check what ranks besides the first of their host have asked for: only what each needs of its own, and that once."""
    first, *others = found
    assert any(path.startswith(RECIPES) for path in first)
    for each in others:
        assert not any(path.startswith(RECIPES) for path in each)
        assert not any(path.endswith(".lock") for path in each)  # what the first rank has built is there
        assert "corpus.txt" not in each
        assert not any(path.startswith(("cache/tokenizers", "run/config", "run/metrics")) for path in each)
        data = {path: count for path, count in each.items() if path.startswith("cache")}
        assert max(data.values()) <= 2 and len(data) <= 13 and sum(data.values()) <= 14, data


def test_one_rank_of_a_host_asks_for_what_all_need(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n\n".join(" ".join(random.Random(n).choices("abcdefgh", k=60)) for n in range(40)))
    inputs = [f"data.input={tmp_path}/corpus.txt", f"data.cache_dir={tmp_path}/cache", "data.seq_len=16", *CORPUS]
    words = [*inputs, f"output_dir={tmp_path}/run", "checkpoint.every=1", "parallel.zero=1", "trainer.steps=2"]
    asked = run_ranks(2, started, str(tmp_path), [*ANY_DATA, *words])
    assert asked[0]["corpus.txt"]
    check_others(asked)
    asked = run_ranks(RANKS, started, str(tmp_path), [*ANY_DATA, *words, "resume=auto", "trainer.steps=3"])
    check_others(asked)
    assert (tmp_path / "run/checkpoints/step-00000003").exists()
    assert asked[0]["run/checkpoints"] and asked[0]["run/checkpoints/step-00000002/manifest.json"]
    assert asked[0]["run/checkpoints/step-00000001/manifest.json"] == 1  # once, in all listings of the folder
    for found in asked[1:]:  # of a checkpoint only what holds arrays
        saved = {Path(path).name for path in found if path.startswith("run/checkpoints") and ".tmp-" not in path}
        assert saved <= {f"rank-0000{saver}.{kind}" for saver in (0, 1) for kind in ("safetensors", "leaves")}
    headers = sum(found.get("run/checkpoints/step-00000002/rank-00000.safetensors", 0) for found in asked)
    assert headers <= 1 + RANKS  # its header once; then the weights, of which each rank reads some
