"""Set-up of DeepSpeed: the optional import, and storage for a model's parameters as each ZeRO stage needs it."""

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
    """Import the `deepspeed` module for a type of device.

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
    # DeepSpeed logs every allocation. Keep its warnings, except the one about untested optimizers, which
    # `optimizer.updates_elementwise` tests.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_not_about_untested_optimizers)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    if device_type == "cpu":
        # Otherwise the first engine compiles a shared-memory collective, for more than a minute, which gloo replaces.
        ops: Any = deepspeed.ops
        ops.__compatible_ops__ = {}
    return deepspeed


def _not_about_untested_optimizers(record: logging.LogRecord) -> bool:
    return "ZeRO with an untested optimizer" not in record.getMessage()


def quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Suppress what DeepSpeed prints to standard output while it starts (its memory use, repeatedly)."""
    return contextlib.redirect_stdout(io.StringIO())


def swap_folder(path: str, rank: int) -> str:
    """Make this process's own folder below `path` for swapped state; it is removed when the process ends.

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


class _AllocatedOneByOne(nn.Module):
    """A model as zero.Init sees it: each parameter is allocated just before it is sharded."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._arguments = (model, device, dtype)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the model's parameters, each whole on the device until the next one is asked for."""
        return _with_storage(*self._arguments)

    def modules(self) -> Iterator[nn.Module]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yield the model's modules, which are not registered as submodules of this one."""
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
    """Allocate a model on the meta device, its parameters zero.

    zero_init: DeepSpeed's configuration for stage 3, where a parameter is sharded as soon as it exists, so that no rank ever
    holds more than one whole; None for the other stages.
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
    deepspeed.zero.Init(module=_AllocatedOneByOne(model, device, dtype), config_dict_or_path=zero_init, dtype=dtype)


def check_quantisable(model: nn.Module, ranks: int) -> None:
    """Raise ConfigError naming the weights of an initialized ZeRO-3 model that DeepSpeed can't quantise on the wire.

    Its kernel takes elements in groups of eight, and computes wrong scales for a weight that is padded to equal shards.
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
