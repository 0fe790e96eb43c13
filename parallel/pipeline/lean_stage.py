"""torch's PipelineStage, without a receive buffer for every micro-batch of the step, and with sums of gradients in fp32.

torch allocates them all before the first step and keeps them: at 128 micro-batches of 64 MiB that is 8 GiB for each
neighbour. A received tensor is needed only until its micro-batch's backward pass, and a gradient only briefly. So the
buffers that torch makes have no storage here (they are on the meta device). Real ones replace them when a receive is
posted, and are released where they are used.
"""

# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false
# The methods overridden here are torch's own internals; their signatures differ between versions, and are passed on.

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from ..compute_time import ComputeTime
from ..heartbeat import Phase
from ..torch.fsdp_gather import fsdp_parameters


class LeanStage(PipelineStage):
    """A drop-in PipelineStage with static shapes; see the module's docstring. Between its passes a rank waits for others."""

    compute_time: ComputeTime

    @contextmanager
    def _without_storage(self) -> Generator[None]:
        real, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = real

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_storage():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_storage():
            return super()._prepare_backward_infra(*args, **kwargs)

    def _get_init_p2p_neighbors_ops(self) -> Any:
        """Leave out messages to a stage on the same rank: torch 2.11 sends them at start-up, and gloo can't deliver them."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _get_recv_ops(self, recv_infos: Sequence[Any]) -> Any:
        for info in recv_infos:
            buffer = getattr(info, "buffer", None)
            if buffer is not None:
                info.buffer = torch.empty_like(buffer, device=self.device).requires_grad_(buffer.requires_grad)
        return super()._get_recv_ops(tuple(recv_infos))

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_activations(fwd_chunk_id)
        _release(self.args_recv_info[fwd_chunk_id])
        return received

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_grads(bwd_chunk_id)
        _release(self.grad_recv_info[bwd_chunk_id])
        return received

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Measure torch's own, and tell the heartbeat."""
        with self.compute_time.stage_pass(Phase.FORWARD, fwd_chunk_id + 1):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Leave out the inputs that are no tensors (absent fields of `Documents`): torch 2.11 asks each for its gradient."""
        cache: dict[int, tuple[Any, list[Any]]] = self.fwd_cache
        outputs, inputs = cache[bwd_chunk_id]
        cache[bwd_chunk_id] = (outputs, [value for value in inputs if isinstance(value, torch.Tensor)])
        with self.compute_time.stage_pass(Phase.BACKWARD, bwd_chunk_id + 1):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """Run the second half of a zero-bubble backward pass, and accumulate its gradients in fp32.

        FSDP2 widens gradients for accumulation in the hooks of a backward pass, which this half does not run.
        """
        with self.compute_time.stage_pass(Phase.BACKWARD, bwd_chunk_id + 1):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
            for module in self.submod.modules():
                if isinstance(module, FSDPModule):
                    for parameter in fsdp_parameters(module):
                        parameter.accumulate_unsharded_grad_if_needed()
                        parameter.to_accumulated_grad_if_needed()


def _release(recv_infos: Sequence[Any]) -> None:
    """Replace buffers by empty placeholders. Their readers keep them alive as long as they need them."""
    for info in recv_infos:
        buffer = getattr(info, "buffer", None)
        if buffer is not None:
            info.buffer = torch.empty_like(buffer, device="meta").requires_grad_(buffer.requires_grad)
