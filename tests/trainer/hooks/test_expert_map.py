"""Files and pictures of what each expert is given."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from meshloom.trainer.hooks import expert_map
from meshloom.trainer.hooks.expert_map import ExpertMap, mutual_information
from meshloom.trainer.hooks.expert_pictures import heat_map, heat_map_svg, png


class Seen(list[tuple[str, Any]]):
    """A hook that keeps the pictures."""

    def on_picture(self, loop: Any, name: str, picture: np.ndarray) -> None:
        self.append((name, picture))


def loop_of(seen: Seen, step: int) -> Any:
    return SimpleNamespace(progress=SimpleNamespace(step=step), hooks=[seen], engine=SimpleNamespace())


def take(hook: ExpertMap, loop: Any, step: int) -> None:
    """Take a step, in which layer 1 gives expert 0 as many tokens as its number and nothing else, and layer 3 all one each."""
    counts = torch.tensor([[float(step), 0, 0], [1, 1, 1]], dtype=torch.float64)
    loop.progress.step = step - 1
    loop.engine.assignments = lambda: counts
    hook.before_update(loop)
    loop.progress.step = step


def run(folder: Path, first: int, last: int) -> Seen:
    """A run of these steps."""
    hook, seen = ExpertMap([1, 3], folder), Seen()
    loop = loop_of(seen, first - 1)
    hook.on_run_accepted(loop)
    for step in range(first, last + 1):
        take(hook, loop, step)
        hook.on_metrics(loop, {"step": step})
    hook.on_run_end(loop, folder)
    return seen


def windows(folder: Path) -> list[tuple[int, int, list[list[int]]]]:
    found = np.load(folder / "load.npz")
    return list(zip(found["first"].tolist(), found["last"].tolist(), found["assignments"].tolist(), strict=True))


def test_few_steps_have_a_window_each(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    assert windows(tmp_path) == [(1, 1, [[1, 0, 0], [1, 1, 1]]), (2, 2, [[2, 0, 0], [1, 1, 1]])]


def test_steps_that_are_taken_again_count_once(tmp_path: Path) -> None:
    """Both after a bad step that is taken again and after one that is skipped: the next had begun before that was known."""
    hook, seen = ExpertMap([1, 3], tmp_path), Seen()
    loop = loop_of(seen, 0)
    take(hook, loop, 1)
    take(hook, loop, 2)
    hook.on_repeat(loop, 1)
    take(hook, loop, 1)
    take(hook, loop, 2)
    hook.on_metrics(loop, {"step": 1, "skipped": 1})
    take(hook, loop, 2)
    hook.on_metrics(loop, {"step": 2})
    hook.on_run_end(loop, tmp_path)
    assert windows(tmp_path) == [(1, 1, [[1, 0, 0], [1, 1, 1]]), (2, 2, [[2, 0, 0], [1, 1, 1]])]


@pytest.mark.parametrize("stop", [1, 3, 6, 7])
def test_windows_are_bounded_and_alike_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    monkeypatch.setattr(expert_map, "MOST_WINDOWS", 4)
    run(tmp_path / "whole", 1, 11)
    assert windows(tmp_path / "whole") == [
        (1, 4, [[10, 0, 0], [4, 4, 4]]),
        (5, 8, [[26, 0, 0], [4, 4, 4]]),
        (9, 11, [[30, 0, 0], [3, 3, 3]]),
    ]
    run(tmp_path / "parts", 1, stop)
    run(tmp_path / "parts", stop + 1, 11)
    assert sum(counts[0][0] for _, _, counts in windows(tmp_path / "parts")) == 66
    assert windows(tmp_path / "parts") == windows(tmp_path / "whole")


def test_a_run_from_the_beginning_starts_anew(tmp_path: Path) -> None:
    run(tmp_path, 1, 5)
    run(tmp_path, 1, 1)
    assert [last for _, last, _ in windows(tmp_path)] == [1]


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "experts").write_text("a file where the folder should be")
    run(tmp_path / "experts", 1, 3)
    assert len(caplog.messages) == 1 and "training goes on" in caplog.text


def test_information_is_that_of_a_table_by_hand() -> None:
    # One source uses experts 0 and 1 alike, the other expert 0 alone: p = (3/4, 1/4).
    counts = torch.tensor([[[5.0, 5.0]], [[30.0, 0.0]]], dtype=torch.float64)
    mean = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert mutual_information(counts).tolist() == pytest.approx([mean - math.log(2) / 2], rel=1e-12)
    apart = torch.eye(4, dtype=torch.float64)[:, None]
    assert mutual_information(apart).tolist() == pytest.approx([math.log(4)])
    assert mutual_information(torch.ones(4, 2, 8)).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_sources_are_written_and_drawn(tmp_path: Path) -> None:
    hook, seen = ExpertMap([1, 3], tmp_path), Seen()
    loop: Any = SimpleNamespace(progress=SimpleNamespace(step=7), hooks=[seen])
    hook.on_routed(loop, {"code": torch.tensor([[4.0, 0], [2, 2]]), "a<b": torch.tensor([[0.0, 4], [2, 2]])})
    row = json.loads((tmp_path / "sources.json").read_text())
    assert row["sources"] == {"code": [[4, 0], [2, 2]], "a<b": [[0, 4], [2, 2]]} and row["step"] == 7
    assert row["information"] == pytest.approx([math.log(2), 0.0], abs=1e-6)
    assert "1 a<b" in "".join(ElementTree.parse(tmp_path / "sources.svg").getroot().itertext())
    ((name, picture),) = seen
    assert name == "experts/sources" and picture.dtype == np.uint8


def test_colours_say_idle_even_and_busy() -> None:
    picture = heat_map(np.array([[[0.0, 1.0, 8.0]]]))
    cell = picture.shape[1] // 3
    idle, even, busy = (picture[0, cell * number].tolist() for number in range(3))
    assert idle[2] > idle[0] and busy[0] > busy[2] and min(even) > 240


def test_png_is_read_by_another_library() -> None:
    image = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    assert np.array_equal(np.asarray(image.open(io.BytesIO(png(picture)))), picture)


def test_large_maps_stay_small() -> None:
    picture = heat_map(np.ones((61, 256, 256)))
    assert picture.shape[1] <= 900 and picture.nbytes < 60e6
    assert len(heat_map_svg(np.ones((4, 64, 256)), title="t", layers=range(4), rows=(), ends=("a", "b"))) < 200_000
