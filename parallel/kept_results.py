"""A checkpoint that keeps the results of some operations: computed again, the rest of its region uses what was kept.

torch has `create_selective_checkpoint_contexts` for this, which compiled blocks need. In regions that run as they are, it wants
every operation of the first pass to come again, no more. FSDP2 breaks that where it holds weights inside a region, as those of
experts: in a pipeline it gathers once a step, so passes of later micro-batches differ in its profiler marks alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Keeps = Callable[[Any], bool]
"""Tells if an operation's result is kept. It may count: each pass over a region has one of its own, made anew."""

_FIX = "use trainer.activation=none, or mend the model's code"


def keeping(make: Callable[[], Keeps]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Make the contexts of a checkpoint (`context_fn`): of the first pass, and of the one that computes it again."""
    kept: deque[_Kept] = deque()
    return _Keeping(make(), kept), _Reusing(make(), kept)


class _Kept(NamedTuple):
    """A result, and the versions that its tensors had when it was kept."""

    out: Any
    versions: tuple[int, ...]


class _Eager(TorchDispatchMode):
    """A mode that a compiled function inside of the region does not see."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self, keeps: Keeps, kept: deque[_Kept]) -> None:
        super().__init__()
        self.keeps, self.kept = keeps, kept


class _Keeping(_Eager):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.keeps(func):
            kept = _detached(out)
            self.kept.append(_Kept(kept, _versions(kept)))
        return out


class _Reusing(_Eager):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.keeps(func):
            if not self.kept:
                raise RuntimeError(f"recomputation runs {func} more often than the forward pass did: {_FIX}")
            out, versions = self.kept.popleft()
            if _versions(out) != versions:
                raise RuntimeError(f"the result of {func} was changed in place after the forward pass kept it: {_FIX}")
            return out
        return func(*args, **(kwargs or {}))


def _versions(out: Any) -> tuple[int, ...]:
    """Return the versions of the tensors in a result: a change in place makes a new one."""
    parts = cast(list[Any], out) if isinstance(out, tuple | list) else [out]
    return tuple(part._version for part in parts if isinstance(part, torch.Tensor))


def _detached(out: Any) -> Any:
    """Return the result outside of the graph of the first pass, which it must not keep alive."""
    if isinstance(out, tuple | list):
        return type(out)(map(_detached, cast(list[Any], out)))
    if not isinstance(out, torch.Tensor):
        return out
    # Beneath autograd a detached tensor would have a version of its own. Nothing public lets it share that of the result.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):  # pyright: ignore[reportPrivateUsage]
        return out.detach()
