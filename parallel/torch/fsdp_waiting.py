"""Tell apart what a rank computes from what it waits for other ranks, under FSDP2.

FSDP2 gathers weights and reduces gradients within the forward and backward passes. So a rank that waits there for a slower one
seems to compute as long as that one. The methods in which FSDP2 waits are enclosed: with gloo the host blocks in them, on a GPU
the stream that computes waits. What they copy besides is left out, too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.distributed.fsdp import FSDPModule

from .fsdp_gather import fsdp_groups

log = logging.getLogger(__name__)

# Private: the methods of FSDP2's record of a module's weights that communicate. Custom collectives are public, but on a GPU
# they run on another stream than the one that waits for them. tests/parallel/torch/test_fsdp_waiting.py notices a change.
WAITING = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")


def enclose_waiting(module: FSDPModule, waiting: Callable[[], AbstractContextManager[None]]) -> None:
    """Enclose what waits for other ranks in the passes of a module that FSDP2 shards. Do nothing where FSDP2 has changed.

    waiting: the context in which it waits
    """
    groups = fsdp_groups(module)
    if any(not callable(getattr(group, name, None)) for group in groups for name in WAITING):
        log.debug("FSDP2 has changed: a rank that is slow in its passes is not told from those that wait for it")
        return
    for group in groups:
        for name in WAITING:
            setattr(group, name, _within(waiting, getattr(group, name)))


def _within(waiting: Callable[[], AbstractContextManager[None]], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with waiting():
            return method(*args, **kwargs)

    return call
