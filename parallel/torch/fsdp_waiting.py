"""Tell apart what a rank computes from what it waits for other ranks, under FSDP2.

FSDP2 gathers weights and reduces gradients within the forward and backward passes. So a rank that waits there for a slower one
seems to compute as long as that one. The methods in which FSDP2 waits are enclosed: with gloo the host blocks in them, on a GPU
the stream that computes waits. What they copy besides is left out, too: weights out of the gathered buffer, gradients into the
one that is reduced and, with CPU offload, to the host.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.distributed.fsdp import FSDPModule

from ..mesh import Mesh
from .fsdp_gather import fsdp_groups

log = logging.getLogger(__name__)

# Private: the methods of FSDP2's record of a module's weights that communicate, and how it tells that they have nothing to do.
# Custom collectives are public, but on a GPU they run on another stream than the one that waits for them.
# tests/parallel/torch/test_fsdp_waiting.py notices a change.
Idle = Callable[[Any], bool]


def _is_whole(group: Any) -> bool:
    return group._all_gather_result is not None or group.is_unsharded


def _gathers_nothing(group: Any) -> bool:
    return group._all_gather_result is None


def _never(_: Any) -> bool:
    return False


WAITING: dict[str, Idle] = {
    "unshard": _is_whole,
    "wait_for_unshard": _gathers_nothing,
    "post_backward": _never,
    "finalize_backward": _never,
}
"""Method → whether it would return at once, and need not be enclosed: each module's methods are called several times a pass."""
HOST_ONLY = ("unshard",)
"""Methods that wait on the host alone: on a GPU they only queue a gather on a stream of its own."""
STATE = ("_all_gather_result", "is_unsharded")
"""Attributes of FSDP2's groups that the functions of `WAITING` look at."""


def enclose_waiting(module: FSDPModule, mesh: Mesh) -> None:
    """Enclose what waits for other ranks in the passes of a module that FSDP2 shards. Where FSDP2 has changed, only warn."""
    groups = fsdp_groups(module)
    if any(not callable(getattr(group, name, None)) for group in groups for name in WAITING) or any(
        not hasattr(group, name) for group in groups for name in STATE
    ):
        if mesh.is_main:
            _warn_of_change()
        return
    on_device = mesh.device.type == "cuda"
    for group in groups:
        for name, idle in WAITING.items():
            if not (on_device and name in HOST_ONLY):
                setattr(group, name, _within(mesh.compute_time.waiting, group, name, idle))


@functools.cache
def _warn_of_change() -> None:
    """Warn, once for all modules."""
    log.warning("this PyTorch's FSDP2 has changed: a rank that is slow in its passes is not told from those that wait for it")


def _within(waiting: Callable[[], AbstractContextManager[None]], group: Any, name: str, idle: Idle) -> Callable[..., Any]:
    method = getattr(group, name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if idle(group):
            return method(*args, **kwargs)
        with waiting():
            return method(*args, **kwargs)

    return call
