"""DeepSpeed brought up: the optional import, and a model's parameters given storage as each stage wants it."""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...config.problems import ConfigError, Problem
from .config import QUANTISED
from .state import whole_shape


def import_deepspeed(device_type: str) -> Any:
    """The `deepspeed` module, told which device is meant.

    Raises ConfigError naming the extra when it is not installed.
    """
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            [
                Problem(
                    "parallel.engine",
                    f"DeepSpeed can't be imported ({error})",
                    "pip install 'meshloom[deepspeed]', or use parallel.engine=torch",
                )
            ]
        ) from error
    # DeepSpeed narrates its every allocation; its warnings stay, but for the one about optimizers that it has not tried:
    # `optimizer.updates_elementwise` has.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_answered)
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 is retiring.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    if device_type == "cpu":
        # Otherwise the first engine compiles a shared-memory collective, for more than a minute, which gloo replaces.
        ops: Any = deepspeed.ops
        ops.__compatible_ops__ = {}
    return deepspeed


def _answered(record: logging.LogRecord) -> bool:
    return "ZeRO with an untested optimizer" not in record.getMessage()


def quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Keep what DeepSpeed prints while it starts (its memory use, over and over) off standard output."""
    return contextlib.redirect_stdout(io.StringIO())


def swap_folder(path: str, rank: int) -> str:
    """A folder of this process's own below `path`, for what it swaps out; removed when the process ends.

    Raises ConfigError when the folder can't be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f"meshloom-rank{rank}-", dir=path)
    except OSError as error:
        problem = Problem("parallel.offload_path", f"can't be written to ({error})", "name a folder on a fast local disk")
        raise ConfigError([problem]) from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class _OneByOne(nn.Module):
    """Stands for a model towards zero.Init, giving each of its parameters storage just before it is taken and cut."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._arguments = (model, device, dtype)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The model's parameters, each whole on the device until the next one is asked for."""
        return _with_storage(*self._arguments)

    def modules(self) -> Iterator[nn.Module]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The model's modules, which are hidden from this one's own bookkeeping."""
        return self._arguments[0].modules()


def _with_storage(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Parameter]:
    replaced: dict[nn.Parameter, nn.Parameter] = {}  # keeps tied parameters tied
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter not in replaced:
                # Zeros, not `empty`: the model runs on them until the masters are filled, and nothing may be NaN.
                replaced[parameter] = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device))
                module._parameters[name] = replaced[parameter]
                yield replaced[parameter]
            else:
                module._parameters[name] = replaced[parameter]


def materialise(model: nn.Module, device: torch.device, dtype: torch.dtype, zero_init: dict[str, Any] | None) -> None:
    """Give a model on the meta device storage, its parameters zero.

    zero_init: DeepSpeed's configuration for stage 3, where a parameter is cut into shards as soon as it exists, so that no
    rank ever holds more than one of them whole; None for the other stages.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    if zero_init is None:
        for _ in _with_storage(model, device, dtype):
            pass
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    deepspeed.init_distributed(dist_init_required=False)
    deepspeed.zero.Init(module=_OneByOne(model, device, dtype), config_dict_or_path=zero_init, dtype=dtype)


def refuse_odd_shards(model: nn.Module, ranks: int) -> None:
    """Raises ConfigError naming the weights, of an initialized ZeRO-3 model, that DeepSpeed can't quantise on the wire.

    Its kernel takes elements by eights, and of a weight that is padded to give each rank as much it gets the scales wrong.
    """
    odd = [
        f"{name} ({'×'.join(map(str, whole_shape(parameter)))})"
        for name, parameter in model.named_parameters()
        if not parameter.ds_persist and parameter.ds_numel % (8 * ranks)  # type: ignore[attr-defined]
    ]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        named = ", ".join(odd[:3]) + more
        message = f"DeepSpeed quantises shards of whole eights of weights, which {ranks} ranks don't have of {named}"
        raise ConfigError([Problem(QUANTISED, message, "change the model's sizes or the number of ranks, or leave it out")])
