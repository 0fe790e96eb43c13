"""`meshloom keys`, and the page made from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meshloom.config.problems import ConfigError
from meshloom.launch.keys import main, markdown, matching

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"


def test_the_page_of_keys_is_what_the_command_prints() -> None:
    made = markdown(matching("")) + "\n"
    assert PAGE.read_text() == made, "make it anew: meshloom keys --markdown > docs/keys.md"


def test_a_key_says_type_default_side_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optim.lr"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("optim.lr=0.0003 (lamb: 0.002")
    assert second.strip() == "int | float | str · recipe" and third.strip().startswith("peak learning rate")


def test_an_options_keys_have_its_defaults() -> None:
    found = {one.name: one.options for one in matching("batch.norm_test")}
    assert found["batch.eta"] == {"norm_test": 0.7} and "batch.over" not in found
    assert {one.group for one in matching("batch")} == {"batch"}


def test_a_word_that_is_no_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean optim\.lr"):
        matching("optim.lrr")


def test_keys_need_neither_torch_nor_hydra() -> None:
    code = "import sys; from meshloom.launch.keys import main; main([]); print(sorted({'torch', 'hydra'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
