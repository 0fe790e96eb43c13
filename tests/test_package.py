"""A wheel of the tree carries everything a run needs and works from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the build leaves nothing in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "outputs", "__pycache__", "tests", "docs")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(folder / "tree")], check=True, capture_output=True, text=True)
    (found,) = folder.glob("meshloom-*.whl")
    return found


def test_wheel_contains_every_module_and_recipe(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("meshloom/")}
    tree = wheel.parent / "tree"
    packages = [path.parent for path in tree.glob("*/__init__.py")]
    assert len(packages) >= 9
    wanted = {tree / "__init__.py", tree / "py.typed", tree / "launch" / "slurm.sbatch"}
    wanted |= {path for package in packages for kind in ("*.py", "*.yaml", "*.html") for path in package.rglob(kind)}
    assert {f"meshloom/{path.relative_to(tree)}" for path in wanted} <= inside
    assert not any(name.startswith("meshloom/tests/") for name in inside)


def test_installed_wheel_composes_a_recipe_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    (tmp_path / "elsewhere").mkdir()
    program = (
        "import meshloom, sys; print(meshloom.__file__, file=sys.stderr); from meshloom.launch import cli; sys.exit(cli.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "train", "recipe=llama_3b", "--cfg", "job"],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stderr, "the installed package was not the one that ran"
    assert "dim: 3072" in done.stdout
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_constraints_keep_a_torch_that_works() -> None:
    """Pip replaces what is installed and against a constraint. Torch 2.11 needs a setuptools below 82."""
    typed, tested = (
        {each.name: each.specifier for line in (ROOT / name).read_text().splitlines()[1:] for each in [Requirement(line)]}
        for name in ("constraints.txt", "constraints-torch.txt")
    )
    assert all(version in typed["torch"] for version in ("2.11.0", "2.11.0+cu130", "2.12.1", "2.13.0+cu130"))
    assert "2.14.0" not in typed["torch"] and "setuptools" not in typed
    (pin,) = tested["torch"]
    assert pin.operator == "==" and pin.version in typed["torch"]
