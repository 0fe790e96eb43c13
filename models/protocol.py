"""What engines, the planner and checkpoints ask of a model: the one interface between `models/` and the floors above.

`Model` has an answer to everything, so that a module of the user's own needs none (`user_module.py`). Where the answer does not
do for a layout (`carve`, `use_kernels`, `tensor_roles`), the user is told by name what the module lacks (`lacks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from torch import nn

from ..kernels.attention import Attend, CausalAttention
from ..kernels.norm import FusedNorm
from ..kernels.swiglu import FusedSwiglu
from .config import DecoderConfig
from .costs import flops_per_token
from .init import Constant, Initial, Normal


class TensorRole(Enum):
    """What a module is to tensor parallelism. Its parent says so, in `tensor_roles`: name of the child → role.

    COLUMN     a projection out of the residual stream: output features are cut
    ROW        a projection back into the stream: input features are cut
    KEY_VALUE  a column projection into key/value heads of the parent's `head_dim`; with fewer heads than ranks it is not cut
    NORM       works on the stream, wherever that lies
    EMBEDDING  a table with a row for each token: cut by rows
    HEAD       as the embedding; the loss takes its cut weight
    """

    COLUMN = "column"
    ROW = "row"
    KEY_VALUE = "key_value"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"


@dataclass(frozen=True)
class BlockKernels:
    """What the parts of a block compute with. norm, swiglu: None for PyTorch's own operations."""

    attend: Attend = CausalAttention()
    norm: FusedNorm | None = None
    swiglu: FusedSwiglu | None = None


class Model(nn.Module):
    """A model as engines see it: an `nn.Module` that is called as `forward(tokens_BS, targets_BS, documents, positions_BS)`.

    It returns logits (B, S, V), or with targets the sum of token losses (scalar, at least fp32). A pipeline stage takes or
    returns hidden states (B, S, D) where it has no embedding or no head.

    decoder_config  the shape of a decoder, from which `costs.py` counts; None for another architecture
    tensor_roles    roles of the model's own children under tensor parallelism
    matrix_names, default_blocks  what the defaults below know of a user's own module: parameters of two dims or more, and
                    its blocks in order
    """

    decoder_config: DecoderConfig | None = None
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {}
    matrix_names: frozenset[str] = frozenset()
    default_blocks: tuple[nn.Module, ...] = ()

    def block_modules(self) -> dict[int, nn.Module]:
        """Return the blocks by layer: the units of sharding, recomputation and compilation. A stage has those that it holds."""
        return dict(enumerate(self.default_blocks))

    def gather_units(self) -> list[nn.Module]:
        """Return the modules whose weights are gathered together, in the order of the forward pass. No two share a weight."""
        return list(self.block_modules().values())

    def rest_readers(self) -> list[nn.Module]:
        """Return the modules before whose call all weights outside of the gather units must be whole."""
        return [self]

    def use_kernels(self, kernels: Mapping[int, BlockKernels]) -> None:
        """Compute with these kernels from now on, by layer. A model that chooses its own ignores it."""

    def carve(self, layers: range, *, first: bool, last: bool) -> Model:
        """Return the pipeline stage of these layers; embedding and head belong to the first and the last."""
        assert first and last, f"{type(self).__name__} can't be carved (`lacks`)"
        return self

    def initial(self, name: str) -> Initial:
        """Return how a parameter begins: matrices normal with 0.02, biases at zero, other vectors (norms' weights) at one."""
        if name in self.matrix_names:
            return Normal(0.02)
        return Constant(0.0 if name.rpartition(".")[2] == "bias" else 1.0)

    def decays(self, name: str) -> bool:
        """Return whether weight decay applies: to matrices."""
        return name in self.matrix_names

    def lr_scale(self, name: str) -> float:
        """Return the factor on the learning rate."""
        return 1.0

    def flops_per_token(self, seq_len: int) -> float:
        """Count forward and backward FLOPs per token, for MFU: 6 per parameter where the shape is not known."""
        if self.decoder_config is not None:
            return flops_per_token(self.decoder_config, seq_len)
        return 6.0 * sum(parameter.numel() for parameter in self.parameters())


def decoder_shape(model: Model) -> DecoderConfig:
    """Return the shape of a decoder, of which alone costs are known."""
    assert model.decoder_config is not None, f"the costs of {type(model).__name__} are not known"
    return model.decoder_config


def lacks(model: Model, method: str) -> bool:
    """Return whether a model leaves this method of `Model` as it stands there."""
    found: Any = getattr(type(model), method)
    return found is getattr(Model, method)
