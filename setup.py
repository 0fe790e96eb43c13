"""Packaging: the repository root is the import package `meshloom`, so the folders at the root are its sub-packages."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FLOORS = ["config", "kernels", "models", "optim", "data", "parallel", "checkpoint", "planner", "trainer", "launch"]


def version() -> str:
    """The one place that says the version is `__init__.py`."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text())
    assert found
    return found.group(1)


def recipes() -> list[str]:
    """Every recipe file, relative to the root, so that a wheel carries them."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "recipes").rglob("*.yaml"))]


def packages() -> list[str]:
    """Every package of every floor, by its name under the root."""
    found = (path.parent.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("__init__.py"))
    return sorted(".".join(path.parts) for path in found)


setup(
    name="meshloom",
    version=version(),
    description="Pre-training of language models on changing clusters: a run is a function of its recipe, not its topology",
    python_requires=">=3.11",
    package_dir={"meshloom": "."},
    packages=["meshloom", "meshloom.recipes", *(f"meshloom.{name}" for name in packages())],
    package_data={"meshloom": ["py.typed", "launch/slurm.sbatch", "launch/report/page.html", *recipes()]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "safetensors>=0.4",
        "rich>=13.8",
        "tokenizers>=0.20",
        "xxhash>=3.4.1",
        "psutil>=5.9",
        "fsspec>=2024.2",
        "filelock>=3.12",
    ],
    extras_require={
        "deepspeed": ["deepspeed==0.19.8"],
        "wandb": ["wandb>=0.17"],
        "tensorboard": ["tensorboard>=2.16"],
        "hf": ["datasets>=2.19", "transformers>=4.53"],
        "lm_eval": ["lm_eval>=0.4.13"],
        "parquet": ["pyarrow>=15"],
        "zstd": ["zstandard>=0.22"],
        "float8": ["torchao>=0.15"],
        "flash4": ["flash-attn-4>=4.0.0b36", "quack-kernels>=0.6.5", "nvidia-cutlass-dsl[cu13]>=4.7"],
        "plots": ["matplotlib>=3.8", "jinja2>=3.1"],
        "fit": ["scipy>=1.12"],
        "submitit": ["hydra-submitit-launcher>=1.2"],
        "watch": ["py-spy>=0.4"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3.1",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "pyright>=1.1.380",
            "import-linter>=2.0",
            "pre-commit>=3.7",
            "setuptools>=70.1",
            "pyarrow>=15",
            "zstandard>=0.22",
            "tensorboard>=2.16",
            "wandb>=0.17",
            "matplotlib>=3.8",
            "scipy>=1.12",
            "transformers>=5.24",
            "pytorch_optimizer>=4.1",
        ],
    },
    entry_points={"console_scripts": ["meshloom=meshloom.launch.cli:main"]},
)
