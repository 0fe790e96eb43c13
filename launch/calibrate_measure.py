"""Measure kernels, copies and collectives of this machine, for `meshloom calibrate`."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.distributed as dist
from torch import nn

from ..kernels.attention import CausalAttention
from ..kernels.attention_blocks import Kernel
from ..kernels.attention_timing import KERNELS, Shape, fastest, seconds, unsupported_reason
from ..kernels.documents import Documents
from ..models.block import Block, BlockKernels
from ..models.config import DecoderConfig
from ..models.part_config import BlockConfig
from ..models.rotary import rotary_table
from ..parallel.config import ParallelConfig
from ..parallel.layout import Layout
from ..planner.block_time import BlockWork, block_time
from ..planner.calibration import Attention, Collective, Measured, Product
from ..planner.cluster import ClusterConfig
from ..planner.kernel_time import Kernels
from ..planner.network import group_of
from ..planner.software import COMPILED, EAGER

REPEATS = 5
LENGTH = 8192
"""Positions at which attention kernels are compared, and of a block's sequences at most."""
GROUPED = 4
"""Query heads that share keys and values, as in most models."""
FEW = 16
"""Tokens of a block whose passes take the GPU less time than the host."""
BRAKED = 1.25
"""Time of a block, of that of launching it, up to which the host may have been the brake."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that are measured.

    products  (rows, out, inner); attention: (head width, positions, documents of a row); tokens: of blocks; dim: of theirs
    copies    bytes; collectives: bytes in all
    warm_up   seconds for which a call is repeated before it is timed, so that the clock falls to what the power limit allows
    burst     seconds of calls that are timed together, so that the host launches ahead of the GPU
    """

    products: Sequence[tuple[int, int, int]]
    attention: Sequence[tuple[int, int, int]]
    attention_tokens: int
    heads: int
    tokens: Sequence[int]
    dim: int
    copies: Sequence[int]
    collectives: Sequence[int]
    warm_up: float
    burst: float


LARGE = Sizes(
    products=[
        (rows, out, inner)
        for rows in (2048, 8192, 32768)
        for out, inner in ((2048, 2048), (8192, 2048), (4096, 4096), (4096, 14336))
    ],
    attention=[
        (width, length, parts) for width in (64, 128) for length, parts in ((2048, 1), (8192, 1), (32768, 1), (8192, 8))
    ],
    attention_tokens=65536,
    heads=32,
    tokens=(2048, 8192, 32768),
    dim=4096,
    copies=(2**28, 2**30),
    collectives=(2**22, 2**26, 2**30),
    warm_up=0.25,
    burst=0.02,
)
"""Sizes for a GPU: about a minute."""

SMALL = Sizes(
    products=[(rows, out, inner) for rows in (64, 256) for out, inner in ((64, 64), (256, 64), (256, 256))],
    attention=[(16, 128, 1), (16, 256, 1), (32, 256, 1), (16, 256, 4)],
    attention_tokens=256,
    heads=4,
    tokens=(64, 128, 256),
    dim=64,
    copies=(2**22,),
    collectives=(2**14, 2**18, 2**21),
    warm_up=0.0,
    burst=0.0,
)
"""Sizes for a processor, on which the command can be tried: seconds."""

Parts = Iterator[tuple[str, Callable[[], None]]]


class Bench:
    """Measures one machine. found: what it has measured so far."""

    def __init__(self, device: torch.device, sizes: Sizes, cluster: ClusterConfig) -> None:
        self.device, self.sizes = device, sizes
        self.precision = "bf16" if device.type == "cuda" else "fp32"
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._cluster = cluster
        self.found = Measured(self.precision)
        self._chosen: dict[int, Kernel] = {}

    def parts(self) -> Parts:
        """Yield each measurement with its name, to be called in order."""
        for rows, out, inner in self.sizes.products:
            yield f"product {rows} × {out} × {inner}", functools.partial(self._product, rows, out, inner)
        for width, length, documents in self.sizes.attention:
            packed = f", {documents} documents" if documents > 1 else ""
            yield f"attention {width} wide, {length}{packed}", functools.partial(self._attention, width, length, documents)
        for size in self.sizes.copies:
            yield f"copy of {size / 2**20:g} MiB", functools.partial(self._copy, size)
        if self.device.type == "cuda":
            yield "copies to the host and back", self._host
        for compiled in (True, False) if self.device.type == "cuda" else (False,):
            yield f"host, blocks {'compiled' if compiled else 'eager'}", functools.partial(self._launch, compiled)
        for tokens in self.sizes.tokens:
            yield f"block, {tokens} tokens", functools.partial(self._block, tokens)

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the median time of a call among calls that follow each other without a wait, after some to warm up.

        All ranks call as often: a call may be a collective.
        """
        run()
        once = self._together(run, 1)
        warm, many = self._agreed(math.ceil(self.sizes.warm_up / once), math.ceil(self.sizes.burst / once))
        self._together(run, warm)
        return median(self._together(run, many) for _ in range(REPEATS))

    def _together(self, run: Callable[[], object], count: int) -> float:
        """Return the seconds of one of so many calls, all of which the device has finished."""
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            run()
        self._wait()
        return (time.perf_counter() - began) / count

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _agreed(self, *counts: int) -> list[int]:
        """Return the first rank's counts on all ranks, each at least 1."""
        agreed = torch.tensor([max(1, count) for count in counts], device=self.device)
        if dist.is_initialized():
            dist.broadcast(agreed, 0)
        return agreed.tolist()

    def _random(self, *shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_(grad)

    def _product(self, rows: int, out: int, inner: int) -> None:
        x, w = self._random(rows, inner), self._random(out, inner)
        self.found.products.append(Product(rows, out, inner, self.seconds(lambda: nn.functional.linear(x, w))))

    def _attention(self, width: int, length: int, documents: int) -> None:
        rows, heads = max(1, self.sizes.attention_tokens // length), self.sizes.heads
        q, k, v = (self._random(rows, length, many, width, grad=True) for many in (heads, heads // GROUPED, heads // GROUPED))
        gradient = self._random(rows, length, heads, width)
        attend, packed, part = CausalAttention(self._kernel(heads, width)), None, length // documents
        if documents > 1:
            packed = Documents.of((torch.arange(length) // part).expand(rows, length).contiguous()).to(self.device)
        forward = self.seconds(lambda: attend(q, k, v, packed))

        def both_ways() -> None:
            torch.autograd.grad(attend(q, k, v, packed), (q, k, v), gradient)

        both = self.seconds(both_ways)
        flops = 2.0 * rows * length * heads * width * part  # the causal half of 4 · width · keys
        self.found.attention.append(Attention(flops, width, part, False, forward))
        self.found.attention.append(Attention(flops, width, part, True, max(both - forward, 0.1 * both)))

    def _kernel(self, heads: int, width: int) -> Kernel:
        """Choose the kernel that runs choose: the fastest at this head width."""
        shape = Shape(LENGTH, heads, heads // GROUPED, width)
        if self.device.type != "cuda":
            return "cudnn"
        if width not in self._chosen:
            usable = [kernel for kernel in KERNELS if unsupported_reason(kernel, shape, self.device) is None]
            self._chosen[width] = fastest(
                {kernel: seconds(kernel, shape, self.device) if kernel in usable else math.inf for kernel in KERNELS}
            )
        return self._chosen[width]

    def _copy(self, size: int) -> None:
        source = torch.zeros(size // 4, device=self.device)
        target = torch.empty_like(source)
        self.found.copies.append(2 * size / self.seconds(lambda: torch.add(source, 1.0, out=target)))

    def _host(self) -> None:
        there = torch.zeros(2**26, device=self.device)
        here = torch.empty(2**26, pin_memory=True)
        self.found.host.append(2**28 / self.seconds(lambda: here.copy_(there, non_blocking=True)))
        self.found.host.append(2**28 / self.seconds(lambda: there.copy_(here, non_blocking=True)))

    def _launch(self, compiled: bool) -> None:
        """Measure what the host takes to launch a block both ways."""
        self.found.launches[compiled] = self.seconds(self._both_ways(FEW, compiled)[1])

    def _both_ways(self, tokens: int, compiled: bool) -> tuple[BlockConfig, Callable[[], object]]:
        """Return the config of a block of Llama's shape, and what computes it both ways."""
        dim = self.sizes.dim
        heads = dim // self.width
        shape = DecoderConfig(
            dim=dim, layers=1, heads=heads, kv_heads=heads // GROUPED, ffn_dim=7 * dim // 2, vocabulary=2
        )  # fmt: skip
        block = Block(shape.block(0)).to(self.device, self.dtype)
        block.use_kernels(BlockKernels(CausalAttention(self._kernel(shape.heads, self.width))))
        if compiled:
            block.compile(dynamic=False)  # as a run compiles its one length
        length = min(tokens, LENGTH)
        x = self._random(tokens // length, length, dim, grad=True)
        gradient = torch.randn_like(x)
        rotary = shape.rotary("full")
        assert rotary is not None
        table = rotary_table(torch.arange(length, device=self.device, dtype=torch.float32), rotary)
        return shape.block(0), lambda: torch.autograd.grad(block(x, table, None)[0], (x, *block.parameters()), gradient)

    def _block(self, tokens: int) -> None:
        """Measure a block both ways, compiled on a GPU, and say how it is predicted."""
        compiled = self.device.type == "cuda"
        config, both_ways = self._both_ways(tokens, compiled)
        measured = self.seconds(both_ways)
        length, software = min(tokens, LENGTH), COMPILED if compiled else EAGER
        parallel, layout = ParallelConfig(), Layout()

        def predicted(cluster: ClusterConfig) -> float:
            one = group_of(cluster, layout, "tp")
            work = BlockWork(tokens, length, "none", False, False, parallel, software, one, one)
            times = block_time(config, work, Kernels(cluster, self.precision))
            return sum(sum(parts.values()) for parts in (times.forward, times.to_input, times.to_weight))

        if measured > BRAKED * self.found.launches[compiled]:  # otherwise it tells nothing of kernels
            self.found.blocks.append((predicted, measured))

    @property
    def width(self) -> int:
        """Width of a block's heads."""
        return 128 if self.sizes.dim >= 1024 else 16

    def collectives(self, nodes: int) -> Parts:
        """Yield the measurements of the process group; of several nodes also inside each, on all of them at once."""
        groups: list[tuple[dist.ProcessGroup | None, int]] = [(None, nodes)]
        if nodes > 1 and (local := dist.get_world_size() // nodes) > 1:
            own, _ = dist.new_subgroups(local)
            assert isinstance(own, dist.ProcessGroup)
            groups.insert(0, (own, 1))
        for group, over in groups:
            where = " across nodes" if over > 1 else ""
            for size in self.sizes.collectives:
                yield f"all-gather of {size / 2**20:g} MiB{where}", functools.partial(self._gather, size, over, group)

    def _gather(self, size: int, nodes: int, group: dist.ProcessGroup | None) -> None:
        ranks = dist.get_world_size(group)
        part = torch.zeros(size // ranks // 4, device=self.device)
        whole = torch.empty(part.numel() * ranks, device=self.device)

        def gather() -> None:
            dist.all_gather_into_tensor(whole, part, group=group)  # pyright: ignore[reportDeprecated] (torch 2.11 has no other)

        seconds = self.seconds(gather)
        self.found.collectives.append(Collective(ranks, nodes, 4 * whole.numel(), seconds))


def measured_peak(found: Measured) -> float:
    """Return the FLOP/s of the fastest product."""
    return max(2 * each.rows * each.out * each.inner / each.seconds for each in found.products)


def with_measured_peaks(cluster: ClusterConfig, found: Measured) -> ClusterConfig:
    """Return the cluster of a processor without a data sheet: its peaks are the fastest that was measured."""
    peak = 1.05 * measured_peak(found) / 1e12
    bandwidth = 1.05 * max(found.copies) / 1e12
    return replace(cluster, bf16=peak, fp32=peak, fp64=peak, fp8=None, bandwidth=bandwidth)


def machine() -> list[str]:
    """Say on what a profile was measured."""
    told = [f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        told.append(f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")
    return [*told, f"{os.cpu_count()} processor cores"]


def join_group(device: torch.device) -> int:
    """Join the process group of torchrun, which started this process; return the number of nodes."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
