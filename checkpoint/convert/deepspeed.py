"""Import from a DeepSpeed ZeRO folder (stages 1–3) or universal folder. Needs no DeepSpeed; runs no code from the files.
`deepspeed_export.py` is the way back.

A ZeRO rank file holds flat slices. Stages 1 and 2: each parameter group is one flat array, its parameters one after the
other, cut into equal slices, one per rank. Stage 3: each parameter is flattened, padded and cut into equal shares; a rank's
flat array has its share of each parameter, one after the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..manifest import state_fault
from .compose import Source, compose
from .deepspeed_export import STATE
from .pickles import load_mapped
from .tokenizer import carry_tokenizer

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
Cut = list[tuple[torch.Tensor, int, int]]  # pieces of a flattened parameter, in order: (flat array, start, length)


def import_deepspeed(source: Path, folder: str | Path, tokenizer: Path | None = None, *, overwrite: bool = False) -> Path:
    """Make a checkpoint out of a DeepSpeed folder (the run's, or one tag's). Files are mapped, one array is held at a time.

    The fp32 master weights become role "weight", optimizer tensors a role by their name. The optimizer's step count, parameter
    groups and hyper-parameters go into the state, under `imported_from`; what was exported from here and not trained on since
    has its own state again. Raises CheckpointError for what can't be told apart by name: model or pipeline parallel ranks
    (convert to universal first), frozen parameters; and for a folder that something is missing of, naming it.
    """
    tag = _tag(source)
    model = _model(tag)
    step = _step(tag, model)
    carried = carry_tokenizer(source, tokenizer)
    own = _own_state(model, step)
    if (tag / "zero").is_dir():
        sources, counters, groups = _universal(tag / "zero")
        state = {"imported_from": {"format": "deepspeed universal", "counters": counters, "groups": groups}}
        return compose(folder, step, sources, own or state | carried.state, carried.files, overwrite=overwrite)
    ranks = _rank_files(tag, _plain(model.get("dp_world_size"), 0))
    optimizers = [load_mapped(path)["optimizer_state_dict"] for path in ranks]
    stage = int(_plain(optimizers[0].get("zero_stage"), 3 if "fp32_flat_groups" in optimizers[0] else 2))
    shapes = _shapes(tag, model)
    flats, counters = _flats(ranks, optimizers, stage)
    sources: list[Source] = []
    for role, by_group in flats.items():
        cuts = _cut_stage_3(by_group, shapes) if stage == 3 else _cut_groups(by_group, shapes)
        for name, shape, cut in cuts:
            sources.append(Source(name, role, cut[0][0].dtype, shape, _joiner(cut, shape)))
    base: Any = optimizers[0][_BASE[stage == 3]]
    hyper = base.get("param_groups", []) if isinstance(base, dict) else []
    state = {
        "imported_from": {
            "format": f"deepspeed zero {stage}",
            "ranks": len(ranks),
            "counters": counters,
            "groups": _groups([list(group) for group in shapes], hyper),
        }
    }
    return compose(folder, step, sources, own or state | carried.state, carried.files, overwrite=overwrite)


def _model(tag: Path) -> dict[str, Any]:
    """Load the first rank's model file; empty where there is none, as may be beside a universal folder."""
    path = next(iter(sorted(tag.glob("*mp_rank_00_model_states.pt"))), None)
    if path is None and not (tag / "zero").is_dir():
        raise CheckpointError(f"{tag}: there is no …mp_rank_00_model_states.pt, which names the parameters")
    return {} if path is None else load_mapped(path)


def _step(tag: Path, model: dict[str, Any]) -> int:
    """The step that the model's file says, or else the last number of the tag."""
    number = re.search(r"(\d+)\D*$", tag.name)
    return _plain(model.get("global_steps"), int(number[1]) if number else 0)


def _groups(flats: list[list[str]], hyper: list[Any]) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: names in its order, and those of its settings that are plain values.

    flats: names in each flat array; a group of the optimizer's may have several (stage 3's sub-groups).
    """
    found: list[dict[str, Any]] = []
    for number, group in enumerate(hyper or [{} for _ in flats]):
        members = [name for flat in group.get("params", [number]) for name in flats[flat]]
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in group.items() if key != "params"}
        found.append({"names": members, "settings": {key: value for key, value in settings.items() if _is_plain(value)}})
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, int | float) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def _own_state(model: dict[str, Any], step: int) -> dict[str, Any] | None:
    """The state of the run that this folder was exported from, if no step was taken since; None for anybody else's."""
    text = model.get(STATE)
    state = json.loads(text) if isinstance(text, str) else None
    if not isinstance(state, dict) or state_fault(state) is not None:
        return None
    progress = state.get("progress")
    return state if isinstance(progress, dict) and progress.get("step") == step else None


def _tag(source: Path) -> Path:
    for pointer in ("latest_universal", "latest"):
        if (source / pointer).is_file():
            tag = source / (source / pointer).read_text().strip()
            if not tag.is_dir():
                raise CheckpointError(f"{source / pointer} names {tag.name}, which is not there")
            return tag
    return source


def _rank_files(tag: Path, ranks: int) -> list[Path]:
    """The optimizer's files, by rank. ranks: how many wrote them, where the model's file says so."""
    found: dict[int, Path] = {}
    for path in tag.glob("*_optim_states.pt"):
        match = _RANK.search(path.name)
        if match is None or int(match[2]) != 0:
            raise CheckpointError(f"{path}: model or pipeline parallel ranks; convert the folder with ds_to_universal first")
        found[int(match[1])] = path
    missing = set(range(max(ranks, max(found, default=0) + 1))) - set(found)
    if missing:
        raise CheckpointError(f"{tag}: the optimizer file of rank {min(missing)} is missing")
    return [found[rank] for rank in sorted(found)]


def _plain(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise


def _shapes(tag: Path, model: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Parameter name → shape for each parameter group, in the order of the flat arrays."""
    if model.get("frozen_param_shapes"):
        raise CheckpointError(f"{tag}: frozen parameters can't be imported")
    groups: Any = model.get("param_shapes")
    if not groups:
        raise CheckpointError(f"{tag}: the model's file names no parameters (param_shapes)")
    return [{key: tuple(shape) for key, shape in group.items()} for group in groups]


_MASTERS = {False: "single_partition_of_fp32_groups", True: "fp32_flat_groups"}  # of stages 1 and 2; of stage 3
_BASE = {False: "base_optimizer_state", True: "optimizer_state_dict"}


def _flats(
    files: list[Path], optimizers: list[Any], stage: int
) -> tuple[dict[str, list[list[torch.Tensor]]], dict[str, float]]:
    """Role → group (stage 3: sub-group) → the ranks' flat arrays; and the numbers that the optimizer keeps."""
    held: list[dict[tuple[str, int], torch.Tensor]] = []
    counters: dict[str, float] = {}
    for optimizer in optimizers:
        base: Any = optimizer[_BASE[stage == 3]]
        states: Any = base["state"] if isinstance(base, dict) else dict(enumerate(base))
        mine: dict[tuple[str, int], torch.Tensor] = {}
        for group, master in enumerate(optimizer[_MASTERS[stage == 3]]):
            mine["weight", group] = master.detach().reshape(-1)
            for key, value in dict(states.get(group, {})).items():
                if isinstance(value, torch.Tensor) and value.dim():
                    mine[key, group] = value.detach().reshape(-1)
                elif isinstance(value, torch.Tensor | int | float):
                    counters[key] = float(value)
        held.append(mine)
    roles = dict.fromkeys(role for mine in held for role, _ in mine)
    groups = 1 + max(group for mine in held for _, group in mine)
    for path, mine in zip(files, held, strict=True):
        for role, group in ((role, group) for role in roles for group in range(groups) if (role, group) not in mine):
            what = "master weights" if role == "weight" else role
            raise CheckpointError(f"{path}: there is no {what} of group {group + 1} of {groups}, as there is of others")
    return {role: [[mine[role, group] for mine in held] for group in range(groups)] for role in roles}, counters


def _cut_groups(
    groups: list[list[torch.Tensor]], shapes: list[dict[str, tuple[int, ...]]]
) -> Iterator[tuple[str, tuple[int, ...], Cut]]:
    if len(groups) != len(shapes):
        raise CheckpointError(f"the model's file names {len(shapes)} groups of parameters, the rank files hold {len(groups)}")
    for slices, parameters in zip(groups, shapes, strict=True):
        at = 0
        for name, shape in parameters.items():
            count = _count(shape)
            yield name, shape, _window(slices, at, count, name)
            at += count


def _window(slices: list[torch.Tensor], at: int, count: int, name: str) -> Cut:
    """Elements `[at, at + count)` of the slices put one after the other."""
    cut: Cut = []
    base = 0
    for flat in slices:
        low, high = max(at, base), min(at + count, base + flat.numel())
        if low < high:
            cut.append((flat, low - base, high - low))
        base += flat.numel()
    if sum(length for _, _, length in cut) != count:
        raise CheckpointError(f"{name}: the rank files hold fewer elements than its shape needs")
    return cut


def _cut_stage_3(
    groups: list[list[torch.Tensor]], shapes: list[dict[str, tuple[int, ...]]]
) -> Iterator[tuple[str, tuple[int, ...], Cut]]:
    world = len(groups[0])
    positions = [(0, 0)] * world  # of each rank: sub-group, and element in it
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        count = _count(shape)
        share = -(-count // world)
        cut: Cut = []
        for rank in range(world):
            group, at = positions[rank]
            if at == groups[group][rank].numel():
                group, at = group + 1, 0
            if group >= len(groups) or at + share > groups[group][rank].numel():
                raise CheckpointError(f"{name}: rank {rank}'s flat arrays end before its share")
            wanted = max(0, min(share, count - rank * share))
            if wanted:
                cut.append((groups[group][rank], at, wanted))
            positions[rank] = (group, at + share)
        yield name, shape, cut


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _joiner(cut: Cut, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    return lambda: torch.cat([flat[start : start + length] for flat, start, length in cut]).reshape(shape)


def _universal(zero: Path) -> tuple[list[Source], dict[str, float], list[dict[str, Any]]]:
    """One folder per parameter, one file per role; stages 1 and 2 store {"param": …}, stage 3 flat tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    names: list[list[str]] = []
    tied: dict[str, str] = {}
    for path in sorted(zero.parent.glob("*model_states.pt")):
        model = load_mapped(path)
        tied |= model.get("shared_params") or {}
        groups: list[Any] = model.get("param_shapes") or []
        for group in groups:
            shapes |= {key: tuple(shape) for key, shape in group.items()}
        names = names or [list(group) for group in groups]
    settings = zero / "optimizer_state.pt"
    hyper = load_mapped(settings).get("param_groups", []) if settings.is_file() else []
    sources: list[Source] = []
    counters: dict[str, float] = {}
    for parameter in sorted(path for path in zero.iterdir() if path.is_dir()):
        name = parameter.name
        if name in tied and (zero / tied[name]).is_dir():
            _refuse_untied(parameter, zero / tied[name])
            continue
        for file in sorted(parameter.glob("*.pt")):
            value = _universal_value(file)
            if value is None or not value.dim():
                counters[file.stem] = float(value if value is not None else load_mapped(file))
                continue
            shape = shapes.get(name, tuple(value.shape))
            if value.numel() < _count(shape):
                raise CheckpointError(f"{file}: {value.numel()} elements for an array of shape {list(shape)}")
            role = "weight" if file.stem == "fp32" else file.stem
            sources.append(Source(name, role, value.dtype, shape, _universal_getter(file, shape)))
    if not sources:
        raise CheckpointError(f"{zero}: there are no parameters in it")
    return sources, counters, _groups(names, hyper)


def _refuse_untied(alias: Path, owner: Path) -> None:
    """Raise CheckpointError if a weight that the model ties to another one has other values."""
    one, other = (_universal_value(folder / "fp32.pt") for folder in (alias, owner))
    if one is not None and other is not None and not torch.equal(one.reshape(-1), other.reshape(-1)):
        raise CheckpointError(f"{alias}: the model's file ties it to {owner.name}, but their values differ")


def _universal_value(file: Path) -> torch.Tensor | None:
    content = load_mapped(file)
    value = content["param"] if isinstance(content, dict) else content
    return value if isinstance(value, torch.Tensor) else None


def _universal_getter(file: Path, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        value = _universal_value(file)
        assert value is not None
        return value.reshape(-1)[: _count(shape)].reshape(shape)

    return read
