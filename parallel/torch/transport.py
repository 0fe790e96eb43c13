"""Transport of weights and gradients between the ranks that share them: by the GPUs' copy engines where possible.

All-gathering weights and exchanging rows of gradients only moves bytes. NCCL's kernels do that on multiprocessors, which then
are missing for concurrent matrix products. Between GPUs of one host NCCL (from 2.28 on) can use the copy engines instead, if
the group was made for that ("zero CTA") and all of its ranks have registered the memory.

A rank then writes directly into its peers' memory, at the offset in a registered segment where its own tensor is. So the
offsets must be the same on all ranks, and NCCL does not check that. Two rules ensure it. Each piece of memory is a segment of
its own, which PyTorch's allocator never splits nor chooses among (it would take the lowest address, which differs between
ranks). And the use of each piece is fixed: no code looks for a free one.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from ..config import ParallelConfig
from ..exchange_groups import choose_levels, groups_of_levels
from ..mesh import Mesh, WeightAxes

log = logging.getLogger(__name__)

gather_rows: Callable[..., Any] = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor")  # noqa: B009
"""All-gather into one tensor. Its name differs between torch 2.11 and 2.13."""

NCCL = (2, 28)
"""The first version with collectives by copy engines."""

PATIENCE = 10.0
"""Seconds to wait for pending communication at the end of a run, and for memory to be released before it is used again."""

SEGMENT = 2**21
"""Bytes: PyTorch's allocator allocates multiples of this, and splits segments smaller than ten times this."""

ALIGNED = 512
"""Bytes: alignment of tensors, that of PyTorch's allocator."""


class Transport:
    """The group in which weights are gathered and rows of gradients exchanged, and its communication buffers.

    All ranks of the group must request the same memory in the same order: memory for copy engines is registered collectively.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, pool: torch.cuda.MemPool | None = None) -> None:
        """pool: memory registered for all ranks' copy engines; None: ordinary memory."""
        self.group = group
        self._device = device
        self._pool = pool
        self._largest = 0
        self._exchange_buffers: dict[torch.dtype, torch.Tensor] = {}
        self._buffers: dict[int, torch.Tensor] = {}
        if pool is not None:
            weakref.finalize(self, _release_pool, device, pool).atexit = False

    @property
    def by_copy_engines(self) -> bool:
        """True if the copy engines transfer, without multiprocessors."""
        return self._pool is not None

    def close(self) -> None:
        """Deregister the memory, before the group is destroyed. Its contents stay."""
        if self._pool is None:
            return
        backend, device, pool = _backend(self.group, self._device), self._device, self._pool

        def deregister() -> None:
            torch.cuda.synchronize(device)
            with torch.cuda.device(device):
                backend.deregister_mem_pool(pool)

        if not _completes(deregister):  # a peer has died, and the group with it
            _keep_forever(self)
            _keep_forever(pool)

    def piece(self, size: int) -> torch.Tensor:
        """Allocate at least so many bytes, uninitialised, registered for the group's copy engines.

        A piece is not freed before the transport.
        """
        assert self._pool is not None
        segments = max(-(-size // SEGMENT), 10)
        with torch.inference_mode(False), torch.cuda.use_mem_pool(self._pool):
            return torch.empty(segments * SEGMENT, dtype=torch.uint8, device=self._device)

    def permanent(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
        """Allocate tensors of these shapes, uninitialised, for the life of the transport. They can be gathered in place."""
        if not self.by_copy_engines or not shapes:
            return [torch.empty(shape, dtype=dtype, device=self._device) for shape in shapes]
        sizes = [_bytes(shape, dtype) for shape in shapes]
        ends = list(itertools.accumulate(-(-size // ALIGNED) * ALIGNED for size in sizes))
        whole = self.piece(ends[-1])
        starts = [0, *ends[:-1]]
        return [
            whole[start : start + size]
            .view(dtype)
            .view(torch.Size(shape))
            .data  # so that autograd does not see writes to one as writes to all
            for start, size, shape in zip(starts, sizes, shapes, strict=True)
        ]

    def reserve(self, numel: int) -> None:
        """Reserve buffers for tensors of up to so many elements."""
        self._largest = max(self._largest, numel)

    def exchange_buffers(self, shape: Sequence[int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a send and a receive buffer of a shape, uninitialised; `like` has their dtype and device.

        For copy engines it is the same memory each time: consume what was received before the next call.
        """
        if not self.by_copy_engines:
            return like.new_empty(shape), like.new_empty(shape)
        if like.dtype not in self._exchange_buffers:
            self._exchange_buffers[like.dtype] = self.permanent([(2, self._largest)], like.dtype)[0]
        sent, received = self._exchange_buffers[like.dtype]
        count = torch.Size(shape).numel()
        return sent[:count].view(shape), received[:count].view(shape)

    def buffer(self, number: int, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return an uninitialised tensor. For copy engines it is the same memory for each number, as large as reserved.

        Raises RuntimeError if a tensor still uses it. It does not look for a free piece: whether a tensor is still held (by a
        thread of the group, for example) may differ between ranks.
        """
        if not self.by_copy_engines:
            return torch.empty(size, dtype=dtype, device=device)
        needed = _bytes(size, dtype)
        if number not in self._buffers:
            self._buffers[number] = self.piece(max(needed, self._largest * dtype.itemsize))
        piece = self._buffers[number]
        if self._in_use(piece) or len(piece) < needed:
            raise RuntimeError("copy engines' memory is in use, or too small; parallel.copy_engines=false does without it")
        with torch.inference_mode(False):
            return piece[:needed].view(dtype).view(torch.Size(size))

    def _in_use(self, piece: torch.Tensor) -> bool:
        """Return whether another tensor uses a piece, after a wait: a group's threads may hold a received tensor briefly."""
        until = time.monotonic() + PATIENCE
        while _storage_uses(piece) > 1:
            if time.monotonic() > until:
                return True
            time.sleep(0.001)
        return False

    def twin(self, mesh: Mesh, axes: WeightAxes) -> Transport:
        """Make another transport of the same ranks, for a second stream: one group must not serve two streams at once."""
        return _copy_engine_transport(mesh, axes)


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _storage_uses(tensor: torch.Tensor) -> int:
    """Count the tensors that share a tensor's storage, itself included."""
    count: Callable[[int], int] = getattr(torch._C, "_storage_Use_Count")  # noqa: B009
    return count(tensor.untyped_storage()._cdata) - 1  # without the storage that was just asked for


def _release_pool(device: torch.device, pool: torch.cuda.MemPool) -> None:
    """Free a deleted transport's memory after pending work: a pool unmaps it even while a GPU writes to it."""
    if not _completes(lambda: torch.cuda.synchronize(device)):
        _keep_forever(pool)


def _completes(work: Callable[[], object]) -> bool:
    """Run work, and return whether it completes without an error within PATIENCE: a GPU waits for a dead peer for ever."""
    ended = threading.Event()

    def attempt() -> None:
        try:
            work()
            ended.set()
        except Exception:
            log.debug("memory could not be taken from the copy engines", exc_info=True)

    waiting = threading.Thread(target=attempt, daemon=True)
    try:
        waiting.start()
    except RuntimeError:  # the interpreter is about to end
        return False
    waiting.join(PATIENCE)
    return ended.is_set()


def _keep_forever(lasting: object) -> None:
    """Keep an object alive until the process ends: freeing it could hang on a dead peer, or crash."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(lasting))


def choose_transport(mesh: Mesh, axes: WeightAxes, parallel: ParallelConfig) -> Transport:
    """Choose copy engines where all ranks support them, otherwise NCCL's (or gloo's) own way. Every process must call it."""
    plain = Transport(axes.shards.get_group(), mesh.device)
    if not parallel.copy_engines or mesh.device.type != "cuda" or axes.num_shards == 1:
        return plain
    if mesh.any(not _supports_copy_engines(mesh, axes)):
        return plain
    made = _on_all_ranks(mesh, lambda: _copy_engine_transport(mesh, axes))
    # The trial has collectives: it begins only if all ranks take part.
    found = None if made is None else _on_all_ranks(mesh, lambda: _verified(made, mesh, axes))
    if found is None:
        return plain
    if mesh.is_main:
        log.info("weights and gradients are sent by the GPUs' copy engines")
    return found


def _on_all_ranks(mesh: Mesh, make: Callable[[], Transport]) -> Transport | None:
    """Return what is made here, or None if that raises on any rank. A collective over all of them."""
    made: Transport | None = None
    try:
        made = make()
    except Exception as error:  # a driver, or a machine, without copy engines
        log.info("the GPUs' copy engines are not used: %s", error)
    return None if mesh.any(made is None) else made


def make_exchange_groups(transport: Transport, mesh: Mesh, name: str, kind: str) -> Sequence[dist.ProcessGroup]:
    """Return the groups in which gradients are exchanged, from the innermost outwards (`exchange_levels.py`).

    Every process must call it.

    name: of the group of parameters; kind: `parallel.gradient_exchange`
    """
    axes = mesh.weight_axes[name]
    if axes.num_shards == 1 or transport.by_copy_engines:
        return (transport.group,)
    return groups_of_levels(mesh, axes.shards, choose_levels(mesh, axes.shards, kind, f"gradients ({name}) are exchanged"))


def _supports_copy_engines(mesh: Mesh, axes: WeightAxes) -> bool:
    """Return whether NCCL supports it, and all ranks that share weights are peers on this host."""
    one_host = len(set(mesh.hosts_along(axes.shards))) == 1
    major, minor = nccl.version()[:2]
    others = [device for device in range(torch.cuda.device_count()) if device != mesh.device.index]
    near = all(torch.cuda.can_device_access_peer(mesh.device, device) for device in others)
    offered = hasattr(dist, "ProcessGroupNCCL") and hasattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO")
    return one_host and near and offered and (major, minor) >= NCCL


def _copy_engine_transport(mesh: Mesh, axes: WeightAxes) -> Transport:
    """Make a transport by copy engines. Raises where they can't be used."""
    backend_class: Any = dist.ProcessGroupNCCL
    options = backend_class.Options()
    options.config.cta_policy = backend_class.NCCL_CTA_POLICY_ZERO
    group = mesh.another_group(axes.shards, options)
    dist.all_reduce(torch.ones(1, device=mesh.device), group=group)  # connects: memory can't be registered before
    backend = _backend(group, mesh.device)
    pool = torch.cuda.MemPool(backend.mem_allocator)
    backend.register_mem_pool(pool, symm=True)
    transport = Transport(group, mesh.device, pool)
    mesh.before_closing.append(_Closing(transport))
    return transport


def _backend(group: dist.ProcessGroup, device: torch.device) -> Any:
    return group._get_backend(device)


class _Closing:
    """Return a callback that closes a transport, if it still exists."""

    def __init__(self, transport: Transport) -> None:
        self._transport = weakref.ref(transport)

    def __call__(self) -> None:
        transport = self._transport()
        if transport is not None:
            transport.close()


def _verified(transport: Transport, mesh: Mesh, axes: WeightAxes) -> Transport:
    """Test the transfers, and return the transport. Raises RuntimeError if what arrives is not what was sent."""
    num_shards, rank, numel = axes.num_shards, axes.shards.get_local_rank(), 2**12
    whole, sent, received = transport.permanent([(num_shards, numel)] * 3, torch.float32)
    whole.zero_()
    whole[rank] = rank + 1.0
    gather_rows(whole.view(-1), whole[rank], group=transport.group, async_op=True).wait()
    sent.copy_(whole * (rank + 1))
    work: Any = dist.all_to_all_single(received, sent, group=transport.group, async_op=True)
    work.wait()
    numbers = torch.arange(1.0, num_shards + 1, device=mesh.device)
    gathered, exchanged = numbers, numbers * (rank + 1)
    if not (
        torch.equal(whole, gathered[:, None].expand_as(whole)) and torch.equal(received, exchanged[:, None].expand_as(whole))
    ):
        raise RuntimeError("they brought something else than what was sent")
    return transport
