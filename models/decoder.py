"""The decoder, composed of parts by its config: embedding, blocks, norm, head and the loss. It knows no rank.

Shape legend: B batch, S sequence, D model width, V vocabulary.

Where parallelism must act inside the model it replaces a callable: each attention's `attend` and the decoder's `token_loss`.
Their defaults are in `kernels/`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import nn

from ..kernels.documents import Documents
from ..kernels.loss import linear_cross_entropy
from .block import Block
from .config import DecoderConfig
from .init import Initial, Normal
from .mixture.ledger import Routing
from .mixture.recurrent import RecurrentCell
from .mixture.router import Carried
from .norm import Norm
from .part import Part, WeightRule
from .protocol import BlockKernels, Model, TensorRole
from .rotary import rotary_table

TokenLoss = Callable[..., torch.Tensor]


class Decoder(Model, Part):
    """The decoder. A pipeline stage is the same module with `embed`, `norm` and `head` or some layers taken out."""

    config_type: ClassVar[type[DecoderConfig]] = DecoderConfig
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "embed": TensorRole.EMBEDDING,
        "norm": TensorRole.NORM,
        "head": TensorRole.HEAD,
        "router_cell": TensorRole.TOKENS,
    }

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = self.decoder_config = config
        self.embed: nn.Embedding | None = nn.Embedding(config.known_vocabulary, config.dim)
        self.layers = nn.ModuleDict({str(layer): Block(block) for layer, block in enumerate(config.blocks())})
        self.norm: Norm | None = Norm(config.norm_of(config.dim))
        self.head: nn.Linear | None = nn.Linear(config.dim, config.known_vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        outer = Normal(config.init_std)
        state = config.experts.carried_dim
        self.router_cell: RecurrentCell | None = RecurrentCell(state) if state else None
        self.weight_rules = {"embed": WeightRule(outer, decays=False), "head": WeightRule(outer)}
        self._rotary = {kind: config.rotary(kind) for kind in dict.fromkeys(map(config.layer_type, range(config.layers)))}
        self.token_loss: TokenLoss = linear_cross_entropy

    def forward(
        self,
        inputs: torch.Tensor,
        targets_BS: torch.Tensor | None = None,
        documents: Documents | None = None,
        positions_BS: torch.Tensor | None = None,
        routing: Routing | None = None,
    ) -> torch.Tensor:
        """Compute logits (B, S, V) of token ids (B, S), or with targets the sum of token losses (scalar, at least fp32).

        A stage without `embed` takes hidden states (B, S, D) instead; one without `head` returns them. The state of recurrent
        routers lies behind the hidden states, (B, S, D + P).
        documents: attention stays inside a document, and positions restart there. positions_BS overrides these positions,
        for a slice of a longer sequence. routing: what mixtures charge, and where they tally; None in evaluations.
        """
        if positions_BS is None:
            row_S = torch.arange(inputs.shape[1], device=inputs.device)
            positions_BS = row_S if documents is None else documents.positions()
        x_BSD, state_TP = self._entered(inputs)
        cell = None if self.router_cell is None else self.router_cell()
        table_dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        positions_BS = positions_BS.to(table_dtype)
        tables = {kind: rotary_table(positions_BS, rotary) for kind, rotary in self._rotary.items() if rotary is not None}
        for layer, block in self.layers.items():
            charges = None if routing is None else routing.charges(int(layer))
            carried = None if state_TP is None or cell is None else Carried(state_TP, cell)
            x_BSD, tally, state = block(x_BSD, tables.get(self.config.layer_type(int(layer))), documents, charges, carried)
            state_TP = state_TP if state is None else state
            if routing is not None and tally is not None:
                routing.record(int(layer), tally)
        if self.norm is None or self.head is None:
            return x_BSD if state_TP is None else torch.cat([x_BSD, state_TP.unflatten(0, x_BSD.shape[:2])], -1)
        x_BSD = self.norm(x_BSD)
        if self.config.mup_width != 1.0:
            x_BSD = x_BSD / self.config.mup_width
        softcap = self.config.logit_softcap
        if targets_BS is None:
            logits_BSV = self.head(x_BSD)
            return logits_BSV if softcap is None else softcap * torch.tanh(logits_BSV / softcap)
        hidden_TD, targets_T = x_BSD.flatten(0, 1), targets_BS.flatten()
        return self.token_loss(hidden_TD, self.head.weight, targets_T, softcap=softcap, z_loss=self.config.z_loss)

    def _entered(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the stream, and the state (T, P) that recurrent routers carry beside it; None without such routers."""
        width = self.config.experts.carried_dim
        if self.embed is None:
            x_BSD, state_BSP = inputs.split([self.config.dim, width], -1)
            return x_BSD, state_BSP.flatten(0, 1) if width else None
        x_BSD = self.embed(inputs)
        if self.config.embedding_factor != 1.0:
            x_BSD = x_BSD * self.config.embedding_factor
        return x_BSD, x_BSD.new_zeros(x_BSD.shape[:2].numel(), width) if width else None

    def block_modules(self) -> dict[int, nn.Module]:
        """Return the blocks by layer."""
        return {int(name): block for name, block in self.layers.items()}

    def gather_units(self) -> list[nn.Module]:
        """Return the embedding, where the head does not share its weight, and the blocks."""
        separate = [] if self.embed is None or self.config.tied else [self.embed]
        return [*separate, *self.layers.values()]

    def rest_readers(self) -> list[nn.Module]:
        """Return a tied embedding, which shares the head's weight, the cell, and the norm, after which that weight is read."""
        readers = (self.embed if self.config.tied else None, self.router_cell, self.norm)
        return [module for module in readers if module is not None]

    def use_kernels(self, kernels: Mapping[int, BlockKernels]) -> None:
        """Let each layer's block compute with its kernels from now on."""
        for layer, block in self.block_modules().items():
            assert isinstance(block, Block)
            block.use_kernels(kernels[layer])

    def carve(self, layers: range, *, first: bool, last: bool) -> Decoder:
        """Return one pipeline stage: a copy of the model (on the meta device) without what other stages hold.

        Parameter names stay. Where the head is tied to the embedding, the last stage's `head.weight` becomes a parameter of
        its own. Each stage with a mixture has the cell of recurrent routers.
        """
        if first and last:
            return self
        stage = copy.deepcopy(self)
        for name in list(stage.layers):
            if int(name) not in layers:
                del stage.layers[name]
        if not any(map(self.config.experts.has_mixture, layers)):
            stage.router_cell = None
        if not first:
            stage.embed = None
        if not last:
            stage.norm = stage.head = None
        return stage

    def weight_rule(self, name: str) -> WeightRule:
        """Return how a parameter begins, decays and learns. Each part knows its own."""
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            block = self.layers[layer]
            assert isinstance(block, Part)
            return block.weight_rule(rest)
        return super().weight_rule(name)

    def stacked(self, name: str) -> int:
        """Return how many matrices of equal shape a parameter stacks along its rows."""
        return self.weight_rule(name).stacked

    def row_parts(self, name: str) -> tuple[int, ...]:
        """Return the rows of each part that a matrix joins."""
        return self.weight_rule(name).row_parts

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        """Return the biases of the choice of experts."""
        return dict(self.named_buffers())

    def initial(self, name: str) -> Initial:
        """Return a parameter's initial distribution (R3)."""
        return self.weight_rule(name).initial

    def decays(self, name: str) -> bool:
        """Return whether weight decay applies to a parameter."""
        return self.weight_rule(name).decays

    def lr_scale(self, name: str) -> float:
        """Return the factor on a parameter's learning rate."""
        return self.weight_rule(name).lr_scale
