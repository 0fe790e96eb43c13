"""Export to DeepSpeed's own formats: a ZeRO folder of rank files, or a universal folder. DeepSpeed loads both by itself.

Rank files are for one number of processes, one ZeRO stage and one precision; `settings.py` says how they lie. A
universal folder is for any number and stage (`"checkpoint": {"load_universal": true}` in DeepSpeed's config).

Whoever loads them builds the model with the same parameter names and gives DeepSpeed an AdamW over the same parameter groups:
those of the run, first what decays, then what does not (`optim.parameters.decay_groups`), each in the model's order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...config.names import name_fault
from ...config.renames import with_moved_targets
from ...models.build import build_model
from ...models.config import DECODER
from ...parallel.fragment import boxes_of_flat_range
from ..dtypes import as_tensor
from ..errors import CheckpointError
from ..files import Files
from ..folder import open_step
from ..manifest import Manifest
from ..reading.reader import Reader
from .progress import tell
from .whole import write_whole

VERSION = "0.19.8"  # of DeepSpeed, whose format this is
ROLES = {"weight": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # ours → universal's
ALIGNMENT = 2  # stages 1 and 2 pad a flat group to a multiple of this times the number of ranks
STATE = "meshloom"  # of the model's file: the run's own state, as text, for the way back
Tree = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """An optimizer's parameter group: names in its order, and its hyper-parameters."""

    names: list[str]
    settings: Tree


class Contents:
    """A checkpoint as DeepSpeed wants to see it.

    groups  the optimizer's; module: key of the module's state_dict → parameter (tied weights have two keys)
    """

    def __init__(self, files: Files) -> None:
        self.manifest: Manifest = open_step(files)
        self.label = files.label()
        self._reader = Reader(files, self.manifest)
        state = self.manifest.state
        self.module, self.groups = self._of_run() if "progress" in state else self._of_import()
        for name in self.names:
            if fault := name_fault(name):
                raise CheckpointError(f"{self.label}: {fault}")
            missing = [role for role in ROLES if f"{role}/{name}" not in self.manifest.arrays]
            if missing:
                raise CheckpointError(f"{self.label}: {name} has no {missing[0]}: only a run with AdamW can become DeepSpeed's")
            if any(self.manifest.arrays[f"{role}/{name}"].dtype != "F32" for role in ROLES):
                raise CheckpointError(f"{self.label}: {name} is not fp32, which DeepSpeed's masters and moments are")
        extra = set(self.manifest.arrays) - {f"{role}/{name}" for role in ROLES for name in self.names}
        if extra:
            raise CheckpointError(f"{self.label}: DeepSpeed has no place for {min(extra)}")
        counters = state.get("counters") or state.get("imported_from", {}).get("counters", {})
        self.updates = torch.tensor(float(counters.get("step", self.manifest.step)))

    @property
    def names(self) -> list[str]:
        """Parameters, group by group."""
        return [name for group in self.groups for name in group.names]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole parameter."""
        return self.manifest.arrays[f"weight/{name}"].shape

    def count(self, name: str) -> int:
        """Elements of a parameter."""
        return torch.Size(self.shape(name)).numel()

    def flat(self, role: str, name: str, start: int, length: int) -> torch.Tensor:
        """Elements `[start, start + length)` of a flattened array, checked."""
        array = self.manifest.arrays[f"{role}/{name}"]
        boxes = [(array, box) for box, _ in boxes_of_flat_range(array.shape, start, length)]
        parts = [as_tensor(raw, array.dtype).reshape(-1) for raw in self._reader.read(boxes)]
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, role: str, name: str) -> torch.Tensor:
        """A whole array, checked."""
        return self.flat(role, name, 0, self.count(name)).reshape(self.shape(name))

    def param_groups(self, members: list[list[int]]) -> list[Tree]:
        """AdamW's groups as its state_dict has them. members: of each, the numbers of the tensors that it updates."""
        plain = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
        return [plain | group.settings | {"params": held} for group, held in zip(self.groups, members, strict=True)]

    def _of_run(self) -> tuple[dict[str, str], list[Group]]:
        """From the recipe that a run saved with its checkpoint."""
        config = self.manifest.state.get("config", {})
        model, optim = config.get("model", {}), config.get("optim", {})
        known = with_moved_targets(model).get("_target_") == DECODER and "weight/embed.weight" in self.manifest.arrays
        if not known:
            raise CheckpointError(f"{self.label}: only the parameter groups of {DECODER} are known")
        if optim.get("_target_") != "meshloom.optim.optimizers.adamw.AdamW":
            raise CheckpointError(f"{self.label}: only a run with AdamW can become DeepSpeed's, not {optim.get('_target_')}")
        decoder = build_model({**model, "vocabulary": self.shape("embed.weight")[0]}, 0)
        names = {id(weight): name for name, weight in decoder.named_parameters()}
        module = {key: names[id(weight)] for key, weight in decoder.state_dict(keep_vars=True).items()}
        decay = float(optim.get("weight_decay", 0.1))
        rate = float(optim.get("lr", 3e-4))
        settings: Tree = {"betas": tuple(optim.get("betas", (0.9, 0.95))), "eps": float(optim.get("eps", 1e-8))}
        keys = sorted({(decoder.decays(name), decoder.lr_scale(name)) for name in names.values()}, reverse=True)
        groups = [
            Group(
                [name for name in names.values() if (decoder.decays(name), decoder.lr_scale(name)) == (decays, scale)],
                {**settings, "lr": rate * scale, "weight_decay": decay if decays else 0.0},
            )
            for decays, scale in keys
        ]
        return module, groups

    def _of_import(self) -> tuple[dict[str, str], list[Group]]:
        """As they were in the DeepSpeed folder that it was imported from."""
        groups = self.manifest.state["imported_from"].get("groups")
        if not groups:
            raise CheckpointError(f"{self.label}: it was imported without parameter groups, so their order is not known")
        found = [
            Group(group["names"], {k: tuple(v) if k == "betas" else v for k, v in group["settings"].items()})
            for group in groups
        ]
        return {name: name for group in found for name in group.names}, found


def export_ranks(files: Files, folder: Path, *, stage: int, ranks: int, dtype: str | None, sub_group: int = 10**9) -> Path:
    """Write a step as DeepSpeed's rank files for this ZeRO stage (1, 2, 3) and number of processes.

    dtype     what DeepSpeed will compute in, bf16 or fp32; None: as the run did
    sub_group DeepSpeed's zero_optimization.sub_group_size, elements (stage 3)

    Host memory holds one rank's file at a time, below stage 3 the weights too. Needs DeepSpeed, whose classes are in the files.
    Raises CheckpointError for a checkpoint that has no such form, a folder that exists, or DeepSpeed not being there.
    """
    if stage not in (1, 2, 3) or ranks < 1:
        raise CheckpointError(f"rank files are for ZeRO stage 1, 2 or 3 and at least 1 process, not {stage} and {ranks}")
    try:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler  # pyright: ignore[reportMissingImports]
        from deepspeed.utils.tensor_fragment import fragment_address  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CheckpointError(
            f"rank files hold DeepSpeed's own classes ({error}): pip install 'meshloom[deepspeed]'"
        ) from error
    contents = Contents(files)
    compute = _compute(contents, dtype)
    prefix = "bf16_" if compute is torch.bfloat16 else ""

    def write(tag: Path) -> None:
        if stage < 3:
            weights = {key: contents.whole("weight", name).to(compute) for key, name in contents.module.items()}
            _save(
                tag / "mp_rank_00_model_states.pt",
                _model_file(contents, weights, ranks, [group.names for group in contents.groups]),
            )
            del weights
        for rank in range(ranks):
            cut = _cut_shards(contents, ranks, rank, sub_group) if stage == 3 else _cut_slices(contents, ranks, rank)
            found = list(cut)
            flats = {role: [_fill(contents, role, pieces, size) for _, size, pieces in found] for role in ROLES}
            masters = flats.pop("weight")
            state = {
                number: {"step": contents.updates.clone(), **{role: flat[number] for role, flat in flats.items()}}
                for number in range(len(found))
            }
            members = [
                [number for number, (of, _, _) in enumerate(found) if of == group] for group in range(len(contents.groups))
            ]
            optimizer = {"state": state, "param_groups": contents.param_groups(members)}
            content: Tree = {"zero_stage": stage, "overflow": False, "dynamic_loss_scale": False}
            content["loss_scaler"] = LossScaler()
            if stage == 3:
                content |= {"partition_count": ranks, "optimizer_state_dict": optimizer, "fp32_flat_groups": masters}
                empty = {key: torch.empty(0, dtype=compute) for key in contents.module}
                model = _model_file(contents, empty, ranks, [[name for name, *_ in pieces] for _, _, pieces in found])
                _save(tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", model)
            else:
                held = [[(name, at, length) for name, _, at, length in pieces] for _, _, pieces in found]
                filled = [sum(length for _, _, length in one) for one in held]
                if not (stage == 1 and compute is torch.bfloat16):  # an optimizer class of its own, which keeps the padding
                    masters = [flat[:size] for flat, size in zip(masters, filled, strict=True)]
                content |= {
                    "ds_version": VERSION,
                    "base_optimizer_state": optimizer,
                    "single_partition_of_fp32_groups": masters,
                    "group_paddings": [size - inside for (_, size, _), inside in zip(found, filled, strict=True)],
                    "param_alignment_paddings": [[0] * len(group.names) for group in contents.groups],
                    "partition_count": [ranks] * len(contents.groups),
                    "param_slice_mappings": [
                        {name: fragment_address(numel=length, start=at) for name, at, length in one} for one in held
                    ],
                }
            name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            _save(tag / name, {"optimizer_state_dict": content, "ds_version": VERSION})
            tell(rank + 1, ranks)

    return _new_folder(folder, f"global_step{contents.manifest.step}", "latest", write)


def export_universal(files: Files, folder: Path) -> Path:
    """Write a step as DeepSpeed's universal checkpoint, for any stage and number of processes. Needs no DeepSpeed.

    Host memory holds one array at a time. Loaded under ZeRO-3 DeepSpeed 0.19.8 gives every parameter group the first one's
    hyper-parameters: set them again afterwards. Raises CheckpointError as `export_ranks` does.
    """
    contents = Contents(files)
    groups = contents.param_groups([[number] for number in range(len(contents.groups))])

    def write(tag: Path) -> None:
        for number, name in enumerate(contents.names, 1):
            place = tag / "zero" / name
            place.mkdir(parents=True)
            for role, theirs in ROLES.items():
                _save(place / f"{theirs}.pt", {"param": contents.whole(role, name), "cat_dim": 0})
            _save(place / "step.pt", contents.updates)
            tell(number, len(contents.names))
        # Stages 1 and 2 read the groups at the top; stage 3 below, with the step.
        below = {"state": {0: {"step": contents.updates}}, "param_groups": groups}
        _save(tag / "zero/optimizer_state.pt", {"param_groups": groups, "optimizer_state_dict": below, "ds_version": VERSION})
        for start in ("", "zero_pp_rank_0_"):
            _save(
                tag / f"{start}mp_rank_00_model_states.pt",
                _model_file(contents, {}, 1, [group.names for group in contents.groups]),
            )

    return _new_folder(folder, f"global_step{contents.manifest.step}_universal", "latest_universal", write)


# One flat array: its parameter group, its elements, and what lies in it: (name, start in the parameter, start here, length).
Cut = tuple[int, int, list[tuple[str, int, int, int]]]


def _cut_slices(contents: Contents, ranks: int, rank: int) -> Iterator[Cut]:
    """Stages 1 and 2: this rank's slice of each group."""
    for number, group in enumerate(contents.groups):
        total = sum(contents.count(name) for name in group.names)
        size = -(-total // (ALIGNMENT * ranks)) * ALIGNMENT
        first, at = rank * size, 0
        pieces: list[tuple[str, int, int, int]] = []
        for name in group.names:
            begin, end = max(at, first), min(at + contents.count(name), first + size)
            if begin < end:
                pieces.append((name, begin - at, begin - first, end - begin))
            at += contents.count(name)
        yield number, size, pieces


def _cut_shards(contents: Contents, ranks: int, rank: int, sub_group: int) -> Iterator[Cut]:
    """Stage 3: this rank's share of each parameter, in sub-groups that end with the parameter that fills them."""
    for number, group in enumerate(contents.groups):
        pieces: list[tuple[str, int, int, int]] = []
        filled = 0
        for name in group.names:
            whole = contents.count(name)
            share = -(-whole // ranks)
            start = min(rank * share, whole)
            pieces.append((name, start, filled, min(share, whole - start)))
            filled += share
            if filled >= sub_group or name == group.names[-1]:
                yield number, filled, pieces
                pieces, filled = [], 0


def _fill(contents: Contents, role: str, pieces: list[tuple[str, int, int, int]], size: int) -> torch.Tensor:
    flat = torch.zeros(size)
    for name, start, at, length in pieces:
        flat[at : at + length] = contents.flat(role, name, start, length)
    return flat


def _compute(contents: Contents, dtype: str | None) -> torch.dtype:
    chosen = dtype or contents.manifest.state.get("config", {}).get("precision", "fp32")
    if chosen not in ("bf16", "fp32"):
        raise CheckpointError(f"DeepSpeed's rank files are for bf16 or fp32 here, not {chosen}; choose with --dtype")
    return torch.bfloat16 if chosen == "bf16" else torch.float32


def _model_file(contents: Contents, weights: dict[str, torch.Tensor], ranks: int, flats: list[list[str]]) -> Tree:
    """flats: names in the order of each flat array."""
    state = contents.manifest.state
    own = set(contents.names)
    return {
        "module": weights,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: torch.Size(contents.shape(name)) for name in names} for names in flats],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {key: name for key, name in contents.module.items() if key not in own},
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": contents.manifest.step,
        "global_samples": state.get("progress", {}).get("samples", 0),
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_version": VERSION,
        STATE: json.dumps(state),
    }


def _save(path: Path, content: Any) -> None:
    with path.open("wb") as output:
        torch.save(content, output)


def _new_folder(folder: Path, tag: str, pointer: str, write: Callable[[Path], None]) -> Path:

    def write_tag(fresh: Path) -> None:
        (fresh / tag).mkdir()
        write(fresh / tag)
        (fresh / pointer).write_text(tag)

    return write_whole(folder, write_tag)
