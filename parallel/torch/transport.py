"""How weights and gradients get from one rank to the others that share them: by GPUs' copy engines where they can.

Gathering weights and handing out gradients' rows only moves bytes. NCCL's kernels do that on multiprocessors, which they take
from the products beside them. Between GPUs of one host NCCL (from 2.28 on) can leave it to the copy engines, if the group was
made for that ("zero CTA") and all of its ranks have registered the memory.

A rank then writes straight into its peers' memory, at the place in a registered segment where its own tensor lies. So these
must be the same on all ranks, and nobody checks it. Two rules see to that. Each piece of memory is a segment of its own, which
PyTorch's allocator never cuts nor chooses among (it would take that with the lowest address, which differs between ranks). And
which piece serves what is fixed: nobody looks for one that happens to be free.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import socket
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from ..config import ParallelConfig
from ..mesh import Mesh, WeightAxes

log = logging.getLogger(__name__)

gather_rows: Callable[..., Any] = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor")  # noqa: B009
"""torch 2.13 has given it another name than 2.11."""

NCCL = (2, 28)
"""The first version with collectives by copy engines."""

PATIENCE = 10.0
"""Seconds for what is still on its way at the end of a run, and for who still holds memory that is to be used again."""

SEGMENT = 2**21
"""PyTorch's allocator asks for memory in multiples of these bytes, and cuts what it asked for below ten times as many."""

ALIGNED = 512
"""Bytes: where tensors begin, as those that the allocator places do."""


class Transport:
    """The group in which weights are gathered and rows of gradients exchanged, and the memory that it does that best from.

    All ranks of the group ask for the same memory in the same order: where copy engines reach it, they register it together.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, pool: torch.cuda.MemPool | None = None) -> None:
        """pool: memory that all ranks' copy engines reach; None: any will do."""
        self.group = group
        self._device = device
        self._pool = pool
        self._largest = 0
        self._exchange_buffers: dict[torch.dtype, torch.Tensor] = {}
        self._buffers: dict[int, torch.Tensor] = {}
        if pool is not None:
            weakref.finalize(self, _let_go, device, pool).atexit = False

    @property
    def by_copy_engines(self) -> bool:
        """Whether no multiprocessor is needed."""
        return self._pool is not None

    def close(self) -> None:
        """The group is about to go: forget that the memory is registered with it. What lies there stays."""
        if self._pool is None:
            return
        backend, device, pool = _backend(self.group, self._device), self._device, self._pool

        def deregister() -> None:
            torch.cuda.synchronize(device)
            with torch.cuda.device(device):
                backend.deregister_mem_pool(pool)

        if not _ends(deregister):  # a peer has died, and the group with it
            _keep(self)
            _keep(pool)

    def piece(self, size: int) -> torch.Tensor:
        """At least so many bytes, without values, which the group's copy engines reach.

        A piece is not given back before the transport is.
        """
        assert self._pool is not None
        segments = max(-(-size // SEGMENT), 10)
        with torch.inference_mode(False), torch.cuda.use_mem_pool(self._pool):
            return torch.empty(segments * SEGMENT, dtype=torch.uint8, device=self._device)

    def permanent(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
        """Tensors of these shapes, without values, for as long as the transport: what is gathered in place."""
        if not self.by_copy_engines:
            return [torch.empty(shape, dtype=dtype, device=self._device) for shape in shapes]
        sizes = [_bytes(shape, dtype) for shape in shapes]
        ends = list(itertools.accumulate(-(-size // ALIGNED) * ALIGNED for size in sizes))
        whole = self.piece(ends[-1])
        starts = [0, *ends[:-1]]
        return [
            whole[start : start + size].view(dtype).view(torch.Size(shape)).data  # to autograd none is written with another
            for start, size, shape in zip(starts, sizes, shapes, strict=True)
        ]

    def reserve(self, numel: int) -> None:
        """Expect that tensors of up to so many elements will be sent and gathered."""
        self._largest = max(self._largest, numel)

    def exchange_buffers(self, shape: Sequence[int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors of a shape, to send from and to receive in, without values; `like` has their dtype and device.

        Where copy engines reach them they are the same memory each time: use up what came before asking for the next.
        """
        if not self.by_copy_engines:
            return like.new_empty(shape), like.new_empty(shape)
        if like.dtype not in self._exchange_buffers:
            self._exchange_buffers[like.dtype] = self.permanent([(2, self._largest)], like.dtype)[0]
        sent, received = self._exchange_buffers[like.dtype]
        count = torch.Size(shape).numel()
        return sent[:count].view(shape), received[:count].view(shape)

    def buffer(self, number: int, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor without values. Where copy engines reach it: the same memory for each number, whoever asks, with room for
        the largest that is expected.

        Raises RuntimeError if a tensor is left there. What is free is not looked for: who else holds a tensor (a thread of the
        group, say) may depend on the rank's time.
        """
        if not self.by_copy_engines:
            return torch.empty(size, dtype=dtype, device=device)
        needed = _bytes(size, dtype)
        if number not in self._buffers:
            self._buffers[number] = self.piece(max(needed, self._largest * dtype.itemsize))
        piece = self._buffers[number]
        if self._held(piece) or len(piece) < needed:
            raise RuntimeError("copy engines' memory is in use, or too small; parallel.copy_engines=false does without it")
        with torch.inference_mode(False):
            return piece[:needed].view(dtype).view(torch.Size(size))

    def _held(self, piece: torch.Tensor) -> bool:
        """Whether a tensor other than itself stays in a piece. A group's threads may hold what came a moment longer."""
        until = time.monotonic() + PATIENCE
        while _owners(piece) > 1:
            if time.monotonic() > until:
                return True
            time.sleep(0.001)
        return False

    def twin(self, mesh: Mesh, axes: WeightAxes) -> Transport:
        """Another one of the same ranks: what runs on two streams at once must not go through one group."""
        return _prepared(mesh, axes)


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _owners(tensor: torch.Tensor) -> int:
    """How many tensors lie in a tensor's memory, itself counted."""
    count: Callable[[int], int] = getattr(torch._C, "_storage_Use_Count")  # noqa: B009
    return count(tensor.untyped_storage()._cdata) - 1  # without the storage that was just asked for


def _let_go(device: torch.device, pool: torch.cuda.MemPool) -> None:
    """A transport is gone: its memory goes next, when nothing on its way needs it. A pool unmaps it whatever writes to it."""
    if not _ends(lambda: torch.cuda.synchronize(device)):
        _keep(pool)


def _ends(work: Callable[[], object]) -> bool:
    """Whether this is done, without an error, after a moment's patience: for a dead peer a GPU would wait for ever."""
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


def _keep(lasting: object) -> None:
    """Until the process ends: to free it would wait for the dead, or end the process badly."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(lasting))


def choose_transport(mesh: Mesh, axes: WeightAxes, parallel: ParallelConfig) -> Transport:
    """By copy engines where all ranks can, otherwise as NCCL (or gloo) does it. Every process calls it."""
    plain = Transport(axes.shards.get_group(), mesh.device)
    if not parallel.copy_engines or mesh.device.type != "cuda" or axes.num_shards == 1:
        return plain
    if mesh.any(not _may(mesh, axes)):
        return plain
    found: Transport | None = None
    try:
        found = _prepared(mesh, axes)
        _try(found, mesh, axes)
    except Exception as error:  # a driver, or a machine, without it
        log.info("the GPUs' copy engines are not used: %s", error)
        found = None
    if mesh.any(found is None) or found is None:
        return plain
    if mesh.is_main:
        log.info("weights and gradients are sent by the GPUs' copy engines")
    return found


def _may(mesh: Mesh, axes: WeightAxes) -> bool:
    """Whether NCCL offers it, and all ranks that share weights are on this host, each within reach of the others."""
    here = zlib.crc32(_host().encode())
    hosts = torch.tensor([here, -here], dtype=torch.int64, device=mesh.device)
    dist.all_reduce(hosts, op=dist.ReduceOp.MAX, group=axes.shards.get_group())
    one_host = hosts.tolist() == [here, -here]
    major, minor = nccl.version()[:2]
    others = [device for device in range(torch.cuda.device_count()) if device != mesh.device.index]
    near = all(torch.cuda.can_device_access_peer(mesh.device, device) for device in others)
    offered = hasattr(dist, "ProcessGroupNCCL") and hasattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO")
    return one_host and near and offered and (major, minor) >= NCCL


def _host() -> str:
    """This host, and the container: two of one name (localhost, say) are told apart by when their kernels began."""
    try:
        began = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        began = ""
    return f"{socket.gethostname()} {began}"


def _prepared(mesh: Mesh, axes: WeightAxes) -> Transport:
    """A transport by copy engines. Raises where that can't be."""
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
    """Closes a transport that is still there."""

    def __init__(self, transport: Transport) -> None:
        self._transport = weakref.ref(transport)

    def __call__(self) -> None:
        transport = self._transport()
        if transport is not None:
            transport.close()


def _try(transport: Transport, mesh: Mesh, axes: WeightAxes) -> None:
    """Raises where what arrives is not what was sent."""
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
