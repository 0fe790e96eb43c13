"""DeepSpeed's configuration, derived from the recipe, and the limits of DeepSpeed under this framework's rules.

The user never writes DeepSpeed's JSON, so that each setting is given once. `parallel.deepspeed.config` adds keys that the
recipe does not have (bucket sizes, hpZ, asynchronous I/O). A key that the recipe decides is refused by name. So is a key
with which DeepSpeed 0.19.8 computes something else than the recipe says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ...config.problems import Problem
from ..config import ParallelConfig
from .keys import ALIASES, COUNTS, DECIDED, LOSSY, NEEDED, NULLABLE, OPEN, REFUSED, REMOVED, SWITCHES, WORDS

Tree = dict[str, Any]
HERE = "parallel.deepspeed.config"
QUANTISED = f"{HERE}.zero_optimization.zero_quantized_weights"

NVME_SUB_GROUP = 100_000_000
"""Parameters that pass through host memory at once for an update on NVMe; DeepSpeed's own 10⁹ take 16 GB of buffers."""


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of everything in a nested dict that is not itself a non-empty dict."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def as_dict(node: Any) -> Tree:
    """Convert the user's keys to plain dicts, the only kind that DeepSpeed reads."""
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)  # type: ignore[return-value]


def _covering(path: str, table: Iterable[str]) -> str | None:
    """Return the entry of a table that equals this path or is a prefix of it; None if there is none."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:end])) in table:
            return prefix
    return None


_OFFLOADED = {"zero_optimization.offload_optimizer": "offload", "zero_optimization.offload_param": "offload_weights"}
_GROUPS = {path.rpartition(".")[0] for path in OPEN} | {path.partition(".")[0] for path in OPEN if "." in path}


def _extra_problems(extra: Tree, config: ParallelConfig) -> Iterator[Problem]:
    for path, value in leaves(extra):
        if value is None and (path in NULLABLE or getattr(config, _OFFLOADED.get(path, ""), "") == "none"):
            continue
        if path not in OPEN:
            yield from _closed(path, value)
        elif why := _wrong_value(path, value):
            yield Problem(f"{HERE}.{path}", *why)
        elif needed := _covering(path, NEEDED):
            keys, places = NEEDED[needed]
            if not any(getattr(config, key) in places for key in keys):
                where = " or ".join(f"parallel.{key}={place}" for key in keys for place in places)
                yield Problem(f"{HERE}.{path}", f"DeepSpeed reads it only with {where}", "leave it out")


def _closed(path: str, value: Any) -> Iterator[Problem]:
    """Yield why a path is not open to the user."""
    if decided := _covering(path, DECIDED):
        yield Problem(f"{HERE}.{path}", f"the recipe decides it with {DECIDED[decided]}", f"set {DECIDED[decided]} instead")
    elif removed := _covering(path, REMOVED):
        instead = f": {REMOVED[removed]}" if REMOVED[removed] else ""
        yield Problem(f"{HERE}.{path}", f"DeepSpeed 0.19.8 has removed it{instead}", "leave it out")
    elif refused := _covering(path, REFUSED):
        if not _is_off(value):
            yield Problem(f"{HERE}.{path}", f"can't be used here: {REFUSED[refused]}", "leave it out")
    elif path in ALIASES:
        yield Problem(f"{HERE}.{path}", "is another name of a key", f"use {ALIASES[path]}")
    elif path in _GROUPS:
        if value != {}:
            yield Problem(
                f"{HERE}.{path}", f"is a group of keys, not {value!r}", f"give it some of {_named(path)}, or leave it out"
            )
    else:
        group = _covering(path, _GROUPS)
        fix = f"the keys open to you{' there' if group else ''} are {_named(group)}"
        yield Problem(f"{HERE}.{path}", "DeepSpeed 0.19.8 does not read this key", fix)


def _is_off(value: Any) -> bool:
    """Return whether the value of a refused key switches it off. A zero does not: it is a number."""
    return value is None or value is False or value == {}


def _named(group: str | None) -> str:
    """Name the open keys of a group, or the top-level ones."""
    if group is None:
        return ", ".join(sorted({path.partition(".")[0] for path in OPEN}))
    return ", ".join(sorted(path.removeprefix(f"{group}.") for path in OPEN if path.startswith(f"{group}.")))


def _wrong_value(path: str, value: Any) -> tuple[str, str] | None:
    """Return what is wrong with the value of an open key, and the fix; None if nothing is."""
    if path in COUNTS:
        least = COUNTS[path]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value != int(value) or value < least:
            return f"{value!r} is not a count", f"give a whole number, {least} or more"
    elif path in SWITCHES and not isinstance(value, bool):
        return f"{value!r} is neither true nor false", "give one of them, or leave it out"
    elif path in WORDS and value not in WORDS[path]:
        return f"there is no {value!r}", f"use {', '.join(WORDS[path])}"
    return None


def deepspeed_problems(config: ParallelConfig, precision: str, world_size: int) -> list[Problem]:
    """List what is wrong with a recipe with parallel.engine=deepspeed on this many processes."""
    problems: list[Problem] = []
    use_torch = "use parallel.engine=torch"
    for key in ("tp", "pp", "cp", "ep"):
        if getattr(config, key) > 1:
            problems.append(
                Problem(f"parallel.{key}", "the DeepSpeed engine is data-parallel only", f"{use_torch} or parallel.{key}=1")
            )
    if config.zero and config.replicate > 1:
        fix = f"{use_torch}, or keep replicate=1 and set parallel.deepspeed.config.zero_optimization.zero_hpz_partition_size"
        problems.append(Problem("parallel.replicate", "DeepSpeed has no hybrid sharding (MiCS was removed)", fix))
    if precision not in ("fp32", "bf16"):
        problems.append(
            Problem(
                "precision", f"DeepSpeed keeps fp32 masters, which {precision} has no use for", f"{use_torch} or bf16, fp32"
            )
        )
    if precision == "bf16" and config.zero == 0:
        problems.append(
            Problem(
                "parallel.zero",
                "with stage 0 in bf16 DeepSpeed takes a phantom optimizer step at start-up",
                "use parallel.zero=1 (the same memory for weights, less for the optimizer) or parallel.engine=torch",
            )
        )
    problems += _offload_problems(config)
    extra = as_dict(config.deepspeed.config)
    wrong = list(_extra_problems(extra, config))
    if wrong:
        return problems + wrong
    zero: Tree = extra.get("zero_optimization") or {}
    near = int(zero.get("zero_hpz_partition_size") or 1)
    if near > 1 and (config.zero != 3 or world_size % near):
        problems.append(
            Problem(
                "parallel.deepspeed.config.zero_optimization.zero_hpz_partition_size",
                f"hpZ copies ZeRO-3's weights per group of {near}; this is ZeRO-{config.zero} on {world_size} processes",
                "use parallel.zero=3 and a size that divides the number of processes, or leave it out",
            )
        )
    for path, what in LOSSY.items():
        key = path.split(".")[1]
        if zero.get(key) and config.zero != 3:
            problems.append(Problem(f"{HERE}.{path}", f"{what}; that needs parallel.zero=3", "leave it out"))
    return problems


def _offload_problems(config: ParallelConfig) -> Iterator[Problem]:
    for key in ("offload", "offload_weights"):
        where = getattr(config, key)
        if where not in ("none", "cpu", "nvme"):
            yield Problem(f"parallel.{key}", f"'{where}' is no place to offload to", "use none, cpu or nvme")
        elif where == "nvme" and not config.offload_path:
            yield Problem("parallel.offload_path", f"parallel.{key}=nvme needs a folder", "name one on a fast local disk")
    if config.offload != "none" and config.zero == 0:
        yield Problem("parallel.offload", "DeepSpeed offloads the state that ZeRO shards", "use parallel.zero=1, 2 or 3")
    if config.offload == "nvme" and config.zero in (1, 2):
        yield Problem("parallel.offload", "DeepSpeed swaps to NVMe under ZeRO-3 only", "use parallel.zero=3 or offload=cpu")
    if config.offload_weights != "none" and config.zero != 3:
        yield Problem("parallel.offload_weights", "only ZeRO-3 shards the weights", "use parallel.zero=3")
    if config.offload_weights != "none" and config.offload == "none":
        yield Problem(
            "parallel.offload_weights",
            "weights go to the host only along with the optimizer's state, which is larger and used less",
            "set parallel.offload=cpu or nvme too",
        )
    if config.deepspeed.cpu_adam and config.offload == "none":
        yield Problem("parallel.deepspeed.cpu_adam", "nothing is offloaded to the CPU", "set parallel.offload, or leave it out")


def lossy_features(config: ParallelConfig) -> list[str]:
    """List the enabled DeepSpeed features that break a rule, for a warning at start-up."""
    return [f"{path}: {LOSSY[path]}" for path, value in leaves(as_dict(config.deepspeed.config)) if path in LOSSY and value]


def derive(config: ParallelConfig, precision: str, *, pin_memory: bool) -> Tree:
    """Derive DeepSpeed's configuration from a recipe without problems.

    Batch sizes are placeholders. Each step sets which micro-batch is its last, so their number may change between steps.
    Gradients are accumulated and reduced in fp32 whatever the weights' precision.
    pin_memory: whether offloaded state lies in page-locked memory (a GPU copies from it while it computes).
    """
    bf16 = precision == "bf16"
    zero: Tree = {"stage": config.zero, "memory_efficient_linear": False, "round_robin_gradients": False}
    for key, device in (("offload_optimizer", config.offload), ("offload_param", config.offload_weights)):
        if device != "none":
            path = {"nvme_path": config.offload_path} if device == "nvme" else {}
            zero[key] = {"device": device, "pin_memory": pin_memory, **path}
    if config.offload == "nvme":
        zero["sub_group_size"] = NVME_SUB_GROUP
    tree: Tree = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "log_level": "warning",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }
    return _merge(tree, as_dict(config.deepspeed.config))


def _merge(base: Tree, extra: Tree, prefix: str = "") -> Tree:
    """Merge both; the user's values win. Counts may be written 5e8, and refused keys may be present, switched off."""
    merged = dict(base)
    for key, value in extra.items():
        below, path = merged.get(key), f"{prefix}{key}"
        if path in REFUSED:  # and switched off, or it would be a problem
            continue
        if isinstance(value, dict):
            merged[key] = _merge(below if isinstance(below, dict) else {}, value, f"{path}.")
        else:
            merged[key] = int(value) if path in COUNTS and value is not None else value
    return merged
