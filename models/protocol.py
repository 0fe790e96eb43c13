"""The one interface between `models/` and the floors above: engines, the planner and checkpoints.

`Model` has a default for every method, so a module of the user's own needs none (`user_module.py`). Where a default does not
suffice for a layout (`carve`, `use_kernels`, `tensor_roles`), an error names what the module lacks (`lacks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import nn

from ..kernels.attention import Attend, CausalAttention
from ..kernels.experts.fused import FusedExperts
from ..kernels.norm import FusedNorm
from ..kernels.swiglu import FusedSwiglu
from .config import DecoderConfig
from .costs import flops_per_token
from .init import Filled, Initial, Normal


class TensorRole(Enum):
    """The role of a module under tensor parallelism. Its parent declares it in `tensor_roles`: name of the child → role.

    COLUMN     a projection out of the residual stream: output features are cut
    ROW        a projection back into the stream: input features are cut
    KEY_VALUE  a column projection into key/value heads of the parent's `head_dim`; with fewer heads than ranks it is not cut
    NORM       works on the stream, whole or cut along the sequence, before a part that needs the stream whole
    POST_NORM  works on the stream as it lies, and leaves it there
    HEADS_NORM      works on a rank's own query heads, each by itself or all ranks' together
    KEY_HEADS_NORM  the same of key heads, which ranks may share
    HEADS_VECTOR    has a number for each query head, and returns those of a rank's own
    LATENT     works on a latent that every rank has whole
    SHARED     hands on what every rank has whole, for each to use with heads of its own
    EMBEDDING  a table with a row for each token: cut by rows
    TOKENS     works on the tokens of the stream as they lie, with whole weights: gradients are summed over ranks
    HEAD       as the embedding; the loss takes its cut weight
    """

    COLUMN = "column"
    ROW = "row"
    KEY_VALUE = "key_value"
    NORM = "norm"
    POST_NORM = "post_norm"
    HEADS_NORM = "heads_norm"
    KEY_HEADS_NORM = "key_heads_norm"
    HEADS_VECTOR = "heads_vector"
    LATENT = "latent"
    SHARED = "shared"
    EMBEDDING = "embedding"
    TOKENS = "tokens"
    HEAD = "head"


@dataclass(frozen=True)
class BlockKernels:
    """Kernels of the parts of a block. norm, swiglu, experts: None for PyTorch's own operations."""

    attend: Attend = CausalAttention()
    norm: FusedNorm | None = None
    swiglu: FusedSwiglu | None = None
    experts: FusedExperts | None = None


class Model(nn.Module):
    """A model as engines see it, called as `forward(tokens_BS, targets_BS, documents, positions_BS)`.

    It returns logits (B, S, V), or with targets the sum of token losses (scalar, at least fp32). A pipeline stage takes or
    returns hidden states (B, S, D) where it has no embedding or no head.

    decoder_config  the shape of a decoder, from which `costs.py` counts; None for another architecture
    tensor_roles    roles of the model's own children under tensor parallelism
    matrix_names    names of the parameters of two dims or more, for the defaults of a user's own module
    default_blocks  the blocks in order, for the same
    """

    decoder_config: DecoderConfig | None = None
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {}
    matrix_names: frozenset[str] = frozenset()
    default_blocks: tuple[nn.Module, ...] = ()

    def block_modules(self) -> dict[int, nn.Module]:
        """Return the blocks by layer, a stage its own: the units of sharding, recomputation and compilation."""
        return dict(enumerate(self.default_blocks))

    def gather_units(self) -> list[nn.Module]:
        """Return the modules whose weights are gathered together, in the order of the forward pass. No two share a weight."""
        return list(self.block_modules().values())

    def rest_readers(self) -> list[nn.Module]:
        """Return the modules before whose call all weights outside of the gather units must be gathered."""
        return [self]

    def use_kernels(self, kernels: Mapping[int, BlockKernels]) -> None:
        """Compute with these kernels from now on, by layer. A model that chooses its own does nothing."""

    def carve(self, layers: range, *, first: bool, last: bool) -> Model:
        """Return the pipeline stage of these layers; embedding and head belong to the first and the last."""
        assert first and last, f"{type(self).__name__} can't be carved (`lacks`)"
        return self

    def initial(self, name: str) -> Initial:
        """Return a parameter's initial distribution: matrices normal with 0.02, biases zero, other vectors (norms) one."""
        if name in self.matrix_names:
            return Normal(0.02)
        return Filled(0.0 if is_bias(name) else 1.0)

    def decays(self, name: str) -> bool:
        """Return whether weight decay applies to a parameter: it does to matrices."""
        return name in self.matrix_names

    def lr_scale(self, name: str) -> float:
        """Return the factor on the learning rate."""
        return 1.0

    def stacked(self, name: str) -> int:
        """Return how many matrices of equal shape a parameter stacks along its rows: the experts of a mixture."""
        return 1

    def row_parts(self, name: str) -> tuple[int, ...]:
        """Return the rows of each part that a matrix joins: of each head, or each fused projection. (): it has no parts."""
        return ()

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        """Return the buffers that are saved as weights are, by name, though no gradient moves them."""
        return {}

    def flops_per_token(self, seq_len: int) -> float:
        """Count forward and backward FLOPs per token, for MFU: 6 per parameter where the shape is not known."""
        if self.decoder_config is not None:
            return flops_per_token(self.decoder_config, seq_len)
        return 6.0 * sum(parameter.numel() for parameter in self.parameters())


def is_bias(name: str) -> bool:
    """Return whether a vector is a bias by its name, such as `bias`, `in_proj_bias` (attention) or `bias_ih_l0` (RNNs)."""
    return "bias" in name.rpartition(".")[2]


def decoder_shape(model: Model) -> DecoderConfig:
    """Return the shape of a decoder. Only a decoder's costs are known."""
    assert model.decoder_config is not None, f"the costs of {type(model).__name__} are not known"
    return model.decoder_config


def hidden_matrices(model: Model) -> frozenset[str]:
    """Return the names of the matrices within blocks: no embedding, no head, no vector, nothing that does not decay."""
    blocks = {id(block) for block in model.block_modules().values()}
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if id(module) in blocks)
    named = ((name, parameter) for name, parameter in model.named_parameters() if name.startswith(prefixes))
    return frozenset(name for name, parameter in named if parameter.dim() == 2 and model.decays(name))


def lacks(model: Model, method: str) -> bool:
    """Return whether a model does not override this method of `Model`."""
    found: Any = getattr(type(model), method)
    return found is getattr(Model, method)


def may_skip_weights(model: Model) -> bool:
    """Return whether a step may use weights on some ranks only, as after a branch on the data or a random choice.

    Meshloom's own classes use all their weights in every pass. Nothing is known of a class of the user's own: the model's, also
    one derived from Meshloom's, or that of a part.
    """
    package = __name__.partition(".")[0]
    whose = [type(module).__module__.partition(".")[0] for module in model.modules()]
    return whose[0] != package or not {package, "torch"}.issuperset(whose)
