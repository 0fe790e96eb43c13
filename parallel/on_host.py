"""Blocks whose saved tensors are kept in host memory until the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..kernels.documents import Documents
from .hybrid.hidden_copies import HiddenCopies

SMALL = 1 << 16  # bytes: a smaller tensor is not worth a copy to the host


class HostCopy(Protocol):
    """A tensor's copy in host memory."""

    def fetch(self) -> torch.Tensor:
        """Return the tensor on its device again."""
        ...


class Copies(Protocol):
    """The copies of one pass over a block."""

    def copy(self, tensor: torch.Tensor) -> HostCopy:
        """Copy a tensor to the host."""
        ...

    def end(self, originals: Sequence[torch.Tensor]) -> None:
        """End the forward pass over the block. originals: what was copied; nobody else may hold it any longer."""
        ...


def on_host(block: nn.Module, forward: Callable[..., Any], begin: Callable[[], Copies | None]) -> Callable[..., Any]:
    """Wrap a block's `forward` so that saved tensors are kept in host memory. A tensor saved several times is copied once.

    begin: makes the copies of a pass; None leaves this pass alone. Weights stay, and what is small.
    """

    def storage(tensor: torch.Tensor) -> int:
        return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage().data_ptr()

    def run(*args: Any, **kwargs: Any) -> Any:
        of_pass = begin()
        if of_pass is None:
            return forward(*args, **kwargs)
        weights = {storage(parameter) for parameter in block.parameters()}
        # The originals are held until the block is through, so that no second tensor can have a first one's address.
        copies: dict[Any, tuple[torch.Tensor, HostCopy]] = {}

        def pack(tensor: torch.Tensor) -> Any:
            if tensor.numel() * tensor.element_size() < SMALL or isinstance(tensor, DTensor) or storage(tensor) in weights:
                return tensor
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor._version)
            if key not in copies:
                copies[key] = (tensor, of_pass.copy(tensor))
            return copies[key][1]

        def unpack(packed: Any) -> torch.Tensor:
            return packed if isinstance(packed, torch.Tensor) else packed.fetch()

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return forward(*args, **kwargs)
        finally:
            of_pass.end([original for original, _ in copies.values()])
            copies.clear()

    return run


class BlockingCopies:
    """Copies on the stream of the computation: they take its time, and no source is overwritten during a copy."""

    def copy(self, tensor: torch.Tensor) -> HostCopy:
        """See `Copies`."""
        return _BlockingCopy(tensor)

    def end(self, originals: Sequence[torch.Tensor]) -> None:
        """See `Copies`."""


class _BlockingCopy:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._device = tensor.device
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._host.copy_(tensor, non_blocking=True)

    def fetch(self) -> torch.Tensor:
        return self._host.to(self._device, non_blocking=True)


class RowOffload:
    """Keeps the activations of some blocks of a row on the host, as many as `HiddenCopies` says, by copies on another stream.

    A block's originals are freed when the next such block has run, those of the latest one when all blocks have. A block is
    copied back while the one behind it is in its backward pass, the latest one from the backward pass of the last block but
    one on. The last two blocks are never chosen: when copying back begins one of them is through, so that n blocks on the
    host make room for n on the device, in both passes. All memory there belongs to the stream of the computation, so that a
    host that runs ahead takes no more of it.
    """

    def __init__(self, copies: HiddenCopies, blocks: Mapping[int, nn.Module], device: torch.device) -> None:
        """blocks: layer → block, in the order in which they run."""
        self._rule = copies
        self._place = {layer: place for place, layer in enumerate(blocks)}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._chosen: frozenset[int] = frozenset()
        self._latest: _HiddenCopies | None = None
        for block, hook in zip(list(blocks.values())[-2:], (self._watch_gradient, self._release_latest), strict=False):
            block.register_forward_hook(hook)

    def begin_row(self, documents: Documents | None) -> None:
        """Choose the blocks of the row that comes."""
        assert documents is not None and documents.host_rings is not None, "rows of documents only"
        self._chosen = self._rule.layers(documents.host_rings.tolist(), len(self._place))
        self._latest = None

    def begin_block(self, layer: int) -> Copies | None:
        """Return the copies of a block's pass; None if its activations stay on the device."""
        if self._place[layer] not in self._chosen or not torch.is_grad_enabled():
            return None
        self._latest = _HiddenCopies(self._stream, self._latest)
        return self._latest

    def _release_latest(self, *_of_block: object) -> None:
        """Free the originals of the latest block, once all blocks have run."""
        if self._latest is not None:
            self._latest.release()

    def _watch_gradient(self, _block: nn.Module, _arguments: object, output: object) -> None:
        """Begin to copy back when the backward pass of the last block but one begins: the last block is then through."""
        stream = output[0] if isinstance(output, tuple) else output
        if self._latest is not None and isinstance(stream, torch.Tensor) and stream.requires_grad:
            stream.register_hook(self._load_latest)

    def _load_latest(self, _gradient: torch.Tensor) -> None:
        if self._latest is not None:
            self._latest.load()
            self._latest = None


class _HiddenCopies:
    """The copies of one block, on a stream of their own. Without a stream they are made at once.

    Originals live from `end` to `release`, copies on the host until autograd drops them, and copies back from `load` on.
    """

    def __init__(self, stream: torch.cuda.Stream | None, before: _HiddenCopies | None) -> None:
        """before: those of the block before it whose activations are on the host."""
        self._stream, self._before = stream, before
        self._copies: list[weakref.ref[_HiddenCopy]] = []  # autograd holds them, as long as it needs them
        self._originals: list[torch.Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._loaded = False

    def copy(self, tensor: torch.Tensor) -> HostCopy:
        """See `Copies`."""
        copy = _HiddenCopy(tensor, self, self._stream)
        self._copies.append(weakref.ref(copy))
        return copy

    def end(self, originals: Sequence[torch.Tensor]) -> None:
        """See `Copies`."""
        self._originals = list(originals)
        if self._stream is not None:
            self._copied = _end_of(self._stream)
        if self._before is not None:
            self._before.release()

    def release(self) -> None:
        """Free the originals, once they are copied."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None
        self._originals = []

    def load(self) -> None:
        """Begin to copy back what is still needed, in the order in which a backward pass reads it."""
        if not self._loaded:
            self._loaded = True
            for copy in filter(None, (reference() for reference in reversed(self._copies))):
                copy.load()

    def need(self) -> None:
        """See that the block's copies are on their way, and those of the block whose turn is next."""
        self.load()
        if self._before is not None:
            self._before.load()
            self._before = None


class _HiddenCopy:
    """A tensor's copy on the host, and from `load` on also one on the device."""

    def __init__(self, tensor: torch.Tensor, of_block: _HiddenCopies, stream: torch.cuda.Stream | None) -> None:
        self._of_block, self._stream, self._device = of_block, stream, tensor.device
        self._back: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
        self._move(tensor, self._host)

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy, on the other stream after what the computation has done so far."""
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def load(self) -> None:
        """Begin to copy the tensor back."""
        self._back = torch.empty_like(self._host, device=self._device)
        self._move(self._host, self._back)
        self._arrived = None if self._stream is None else _end_of(self._stream)

    def fetch(self) -> torch.Tensor:
        """See `HostCopy`."""
        self._of_block.need()
        assert self._back is not None
        if self._arrived is not None:
            torch.cuda.current_stream().wait_event(self._arrived)
        return self._back


def _end_of(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return the end of what is queued on a stream so far."""
    event = torch.cuda.Event()
    event.record(stream)
    return event
