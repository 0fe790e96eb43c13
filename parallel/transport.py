"""How weights and gradients get from one rank to the others that share them: by GPUs' copy engines where they can.

Gathering weights and handing out gradients' rows only moves bytes. NCCL's kernels do that on multiprocessors, which they take
from the products beside them. Between GPUs of one host NCCL (from 2.28 on) can leave it to the copy engines, if the group was
made for that ("zero CTA") and all of its ranks have registered the memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import socket
import threading
import weakref
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from ..config.parallel import ParallelConfig
from .mesh import Mesh

log = logging.getLogger(__name__)

gather_rows: Callable[..., Any] = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor")  # noqa: B009
"""torch 2.13 has given it another name than 2.11."""

NCCL = (2, 28)
"""The first version with collectives by copy engines."""

PATIENCE = 10.0
"""Seconds at the end of a run for what is still on its way."""


class Transport:
    """The group in which weights are gathered and rows of gradients exchanged, and the memory that it does that best from.

    Memory is taken in the same order on all ranks of the group: where copy engines are used, each piece is registered together.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, pool: torch.cuda.MemPool | None = None) -> None:
        """pool: memory that all ranks' copy engines reach; None: any will do."""
        self.group = group
        self._device = device
        self._pool = pool
        self._largest = 0
        self._parcels: dict[torch.dtype, torch.Tensor] = {}
        self._slots: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        if pool is not None:  # memory of a pool is unmapped when that goes, whatever still writes to it
            weakref.finalize(self, _idle, device).atexit = False

    @property
    def by_copy_engines(self) -> bool:
        """Whether no multiprocessor is needed."""
        return self._pool is not None

    def close(self) -> None:
        """The group is about to go: forget that the memory is registered with it. What lies there stays."""
        if self._pool is None:
            return
        try:
            if not _idle(self._device):
                raise TimeoutError("something is still on its way")
            _backend(self.group, self._device).deregister_mem_pool(self._pool)
        except Exception:  # a peer has died, and the group with it
            log.debug("memory could not be taken from the copy engines' group", exc_info=True)
            for lasting in (self, self._pool):  # until the process ends: to free them would wait for the dead, or end it badly
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(lasting))

    def memory(self) -> AbstractContextManager[Any]:
        """What is allocated in it, and gathered, lies where the copy engines reach."""
        return contextlib.nullcontext() if self._pool is None else torch.cuda.use_mem_pool(self._pool)

    def expect(self, elements: int) -> None:
        """Parcels will have up to so many."""
        self._largest = max(self._largest, elements)

    def parcels(self, shape: Sequence[int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors of a shape, to send from and to receive in, without values; `like` has their dtype and device.

        Where copy engines reach them they are the same memory each time: use up what came before asking for the next.
        """
        if self._pool is None:
            return like.new_empty(shape), like.new_empty(shape)
        if like.dtype not in self._parcels:
            with self.memory():
                self._parcels[like.dtype] = like.new_empty(2, self._largest)
        sent, received = self._parcels[like.dtype]
        count = torch.Size(shape).numel()
        return sent[:count].view(shape), received[:count].view(shape)

    def slot(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor without values in memory that nobody uses, for work on the current stream.

        Where copy engines reach it, a piece is used again when its last tensor is gone: the first one made, so that all ranks
        take the same. PyTorch's allocator would take that with the lowest address, which differs between them.
        """
        if self._pool is None:
            return torch.empty(size, dtype=dtype, device=device)
        made = self._slots.setdefault((torch.Size(size), dtype, torch.cuda.current_stream(device)), [])
        for slot in made:
            if _owners(slot) == 1:
                return slot.view(size)
        with torch.inference_mode(False), self.memory():
            made.append(torch.empty(size, dtype=dtype, device=device))
        return made[-1].view(size)

    def twin(self, mesh: Mesh) -> Transport:
        """Another one of the same ranks: what runs on two streams at once must not go through one group."""
        return _prepared(mesh)


def _idle(device: torch.device) -> bool:
    """Whether the GPU has done what was asked of it, after a moment's patience: for a dead peer it would wait for ever."""
    waiting = threading.Thread(target=torch.cuda.synchronize, args=(device,), daemon=True)
    waiting.start()
    waiting.join(PATIENCE)
    return not waiting.is_alive()


def _owners(tensor: torch.Tensor) -> int:
    """How many tensors lie in a tensor's memory, itself counted."""
    count: Callable[[int], int] = getattr(torch._C, "_storage_Use_Count")  # noqa: B009
    return count(tensor.untyped_storage()._cdata) - 1  # without the storage that was just asked for


def choose_transport(mesh: Mesh, parallel: ParallelConfig) -> Transport:
    """By copy engines where all ranks can, otherwise as NCCL (or gloo) does it. Every process calls it."""
    plain = Transport(mesh.group("weights"), mesh.device)
    if not parallel.copy_engines or mesh.device.type != "cuda" or mesh.size("weights") == 1:
        return plain
    if mesh.any(not _may(mesh)):
        return plain
    found: Transport | None = None
    try:
        found = _prepared(mesh)
        _try(found, mesh)
    except Exception as error:  # a driver, or a machine, without it
        log.info("the GPUs' copy engines are not used: %s", error)
        found = None
    if mesh.any(found is None) or found is None:
        return plain
    if mesh.is_main:
        log.info("weights and gradients are sent by the GPUs' copy engines")
    return found


def _may(mesh: Mesh) -> bool:
    """Whether NCCL offers it, and all ranks that share weights are on this host, each within reach of the others."""
    here = zlib.crc32(socket.gethostname().encode())
    hosts = torch.tensor([here, -here], dtype=torch.int64, device=mesh.device)
    dist.all_reduce(hosts, op=dist.ReduceOp.MAX, group=mesh.group("weights"))
    one_host = hosts.tolist() == [here, -here]
    major, minor = nccl.version()[:2]
    others = [device for device in range(torch.cuda.device_count()) if device != mesh.device.index]
    near = all(torch.cuda.can_device_access_peer(mesh.device, device) for device in others)
    offered = hasattr(dist, "ProcessGroupNCCL") and hasattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO")
    return one_host and near and offered and (major, minor) >= NCCL


def _prepared(mesh: Mesh) -> Transport:
    backend_class: Any = dist.ProcessGroupNCCL
    options = backend_class.Options()
    options.config.cta_policy = backend_class.NCCL_CTA_POLICY_ZERO
    group = mesh.another_group("weights", options)
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
    """Closes a transport that is still there."""

    def __init__(self, transport: Transport) -> None:
        self._transport = weakref.ref(transport)

    def __call__(self) -> None:
        transport = self._transport()
        if transport is not None:
            transport.close()


def _try(transport: Transport, mesh: Mesh) -> None:
    """Raises where what arrives is not what was sent."""
    ways, rank, room = mesh.size("weights"), mesh.axes["weights"].get_local_rank(), 2**12
    with transport.memory():
        whole = torch.zeros(ways, room, device=mesh.device)
    whole[rank] = rank + 1.0
    gather_rows(whole.view(-1), whole[rank], group=transport.group, async_op=True).wait()
    with transport.memory():
        sent, received = torch.empty_like(whole), torch.empty_like(whole)
    sent.copy_(whole * (rank + 1))
    work: Any = dist.all_to_all_single(received, sent, group=transport.group, async_op=True)
    work.wait()
    numbers = torch.arange(1.0, ways + 1, device=mesh.device)
    gathered, exchanged = numbers, numbers * (rank + 1)
    if not (
        torch.equal(whole, gathered[:, None].expand_as(whole)) and torch.equal(received, exchanged[:, None].expand_as(whole))
    ):
        raise RuntimeError("they brought something else than what was sent")
