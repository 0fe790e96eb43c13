"""Config of mixtures of experts: what the keys say, and what one layer's mixture is built from. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, cast

from ...config.keys import Side, key
from ...config.nodes import Custom
from ...config.problems import Problem
from ..part_config import FeedForwardConfig, MatrixScales

SCORES = ("softmax", "sigmoid")
ROUTERS = ("top_k", "recurrent", "relu")
STATE_DIM = 128


@dataclass(frozen=True)
class PartsConfig:
    """Parts of a mixture of a user's own class: its `_target_` and the keys that it is called with; null: Meshloom's own."""

    SIDE: ClassVar[Side] = Side.RECIPE

    router: Any = key(None, "a router of your own (`_target_`), in the place of model.experts.router")
    dispatch: Any = key(None, "what brings tokens to their experts and back (`_target_`)")
    product: Any = key(None, "what multiplies each expert's rows with its matrix (`_target_`)")
    combine: Any = key(None, "what sums the outputs of a token's experts (`_target_`)")

    def node(self, name: str) -> Custom | None:
        """Return the class of a part and its keys; None for Meshloom's own."""
        keys = dict(getattr(self, name) or {})
        return Custom(str(keys.pop("_target_")), keys) if "_target_" in keys else None

    def problems(self, key: str) -> Iterator[Problem]:
        """Yield a problem for each part whose class is not named."""
        for each in fields(self):
            node = getattr(self, each.name)
            if node is not None and not (isinstance(node, Mapping) and isinstance(cast(Any, node).get("_target_"), str)):
                yield Problem(f"{key}.{each.name}", "names no class", f"give {key}.{each.name}._target_, or null for ours")


@dataclass(frozen=True)
class ExpertsConfig:
    """Layers with a mixture of experts as their feed-forward, and the choice of each token among the experts."""

    SIDE: ClassVar[Side] = Side.RECIPE

    count: int = key(0, "experts of a mixture; 0: every feed-forward is dense")
    top_k: int = key(2, "experts that each token chooses")
    router: str = key(
        "top_k",
        "what chooses them: top_k, a linear router of each layer; recurrent, a gated recurrent unit that layers share, whose"
        " state passes from layer to layer (RMoE, arXiv 2408.06793); relu: all experts with a positive logit act, at most top_k"
        " of them (BlockFFN, arXiv 2507.08771)",
    )
    state_dim: int = key(STATE_DIM, "width of a recurrent router's state")
    gated: bool = key(True, "experts have a gate: w2(activation(w1 x) · w3 x); false: w2(activation(w1 x)), as BlockFFN's")
    ffn_dim: int | None = key(None, "inner width of an expert; null: that of the dense feed-forward")
    shared: int = key(0, "experts that every token passes, in one feed-forward as wide as all of them together")
    dense_layers: int = key(0, "first layers whose feed-forward stays dense")
    layers: list[int] | None = key(None, "layers with a mixture, counted from 0; null: all but the first dense_layers")
    scores: str = key("softmax", "an expert's score from its logit: softmax over the experts, or sigmoid of each")
    renormalise: bool = key(True, "divide the scores of the chosen experts by their sum")
    scale: float = key(1.0, "factor on the chosen experts' scores")
    groups: int = key(1, "groups of experts; a token chooses within its best ones, by the sum of a group's two best scores")
    top_groups: int = key(1, "groups that a token chooses within")
    bias: bool = key(False, "a bias per expert that only the choice sees (DeepSeek-V3); balance.bias_rate moves it")
    logit_bias: bool = key(False, "a trained bias of the router's logits (gpt-oss)")
    capacity: float | None = key(
        None, "an expert takes at most this times the mean number of tokens of a micro-batch; null: no token is dropped"
    )

    parts: PartsConfig = field(default_factory=PartsConfig)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Make the config from plain values of its keys. Raises TypeError for a key that it does not have."""
        made = dict(values)
        if isinstance(made.get("parts"), Mapping):
            made["parts"] = PartsConfig(**made["parts"])
        return cls(**made)

    @property
    def carried_dim(self) -> int:
        """The width of the state that routers hand from layer to layer; 0: they hand on nothing."""
        return self.state_dim if self.count and self.router == "recurrent" else 0

    @property
    def cell_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights that recurrent routers share, by name."""
        width = self.carried_dim
        matrix, vector = (3 * width, width), (3 * width,)
        return {"weight_ih": matrix, "weight_hh": matrix, "bias_ih": vector, "bias_hh": vector} if width else {}

    def has_mixture(self, layer: int) -> bool:
        """Return whether a layer's feed-forward is a mixture."""
        if self.count == 0:
            return False
        return layer >= self.dense_layers if self.layers is None else layer in self.layers

    def problems(self, key: str, layers: int) -> Iterator[Problem]:
        """Yield what is wrong with the values. layers: of the model."""
        if self.count < 0:
            yield Problem(f"{key}.count", f"{self.count} is no number of experts", "use 0 for dense layers, or 1 or more")
        if self.count < 1:
            return
        if not 1 <= self.top_k <= self.count:
            yield Problem(f"{key}.top_k", f"{self.top_k} can't be chosen of {self.count} experts", f"use 1 to {self.count}")
        if self.ffn_dim is not None and self.ffn_dim < 1:
            yield Problem(f"{key}.ffn_dim", f"{self.ffn_dim} is not a size", "use 1 or more")
        if self.shared < 0:
            yield Problem(f"{key}.shared", f"{self.shared} is no number of experts", "use 0 or more")
        if self.router not in ROUTERS:
            yield Problem(f"{key}.router", f"there is no '{self.router}'", f"use {' or '.join(ROUTERS)}, or {key}.parts.router")
        if self.state_dim < 1:
            yield Problem(f"{key}.state_dim", f"{self.state_dim} is not a size", "use 1 or more")
        elif self.state_dim != STATE_DIM and self.router != "recurrent":
            fix = f"use {key}.router=recurrent, or leave it at {STATE_DIM}"
            yield Problem(f"{key}.state_dim", f"{key}.router={self.router} has no state", fix)
        yield from self._relu_problems(key) if self.router == "relu" else ()
        if self.parts.router is not None and self.router in ROUTERS and self.router != "top_k":
            text = f"{key}.parts.router takes the place of it, and need not have what it has"
            yield Problem(f"{key}.router", text, f"use top_k, or leave {key}.parts.router null")
        if not self.gated and self.shared:
            yield Problem(f"{key}.shared", "shared experts have a gate, and the others none", f"use 0, or {key}.gated=true")
        yield from self.parts.problems(f"{key}.parts")
        if self.scores not in SCORES:
            yield Problem(f"{key}.scores", f"there is no '{self.scores}'", f"use {' or '.join(SCORES)}")
        if not 0 < self.scale < math.inf:
            yield Problem(f"{key}.scale", f"{self.scale} can't be", "use a number above 0, 1 for none")
        if self.bias and self.scores == "softmax":
            text = "a bias is added to scores that don't depend on each other, and softmax makes them depend"
            yield Problem(f"{key}.bias", text, f"use {key}.scores=sigmoid, or false")
        if self.capacity is not None and not 0 < self.capacity < math.inf:
            yield Problem(f"{key}.capacity", f"{self.capacity} can't be", "use 1 or more, or null to drop no token")
        yield from self._layer_problems(key, layers)
        yield from self._group_problems(key)

    def _layer_problems(self, key: str, layers: int) -> Iterator[Problem]:
        if self.layers is not None and self.dense_layers:
            yield Problem(f"{key}.dense_layers", f"{key}.layers names the layers already", "use 0, or leave layers null")
        elif self.layers is not None and [layer for layer in self.layers if not 0 <= layer < layers]:
            yield Problem(f"{key}.layers", f"{self.layers} names layers that are not there", f"use 0 to {layers - 1}")
        elif not any(map(self.has_mixture, range(layers))):
            name = "dense_layers" if self.layers is None else "layers"
            yield Problem(f"{key}.{name}", "no layer is left for the experts", f"change it, or use {key}.count=0")

    def _relu_problems(self, key: str) -> Iterator[Problem]:
        """Yield the keys of other routers, which a ReLU router does not read."""
        for name, value in {"scores": "softmax", "renormalise": True, "scale": 1.0, "groups": 1, "capacity": None}.items():
            if getattr(self, name) != value:
                fix = f"use {'null' if value is None else str(value).lower()}, or {key}.router=top_k"
                yield Problem(f"{key}.{name}", "a ReLU router does not have it", fix)
        for name in ("bias", "logit_bias"):
            if getattr(self, name):
                yield Problem(f"{key}.{name}", "a ReLU router has no bias", f"use false, or {key}.router=top_k")

    def _group_problems(self, key: str) -> Iterator[Problem]:
        if self.groups < 1 or self.count % self.groups:
            yield Problem(f"{key}.groups", f"{self.groups} groups don't divide {self.count} experts", "use a divisor")
        elif not 1 <= self.top_groups <= self.groups:
            yield Problem(f"{key}.top_groups", f"{self.top_groups} of {self.groups} groups can't be", f"use 1 to {self.groups}")
        elif self.count >= self.top_k > self.top_groups * (self.count // self.groups):
            text = f"{self.top_groups} groups have {self.top_groups * (self.count // self.groups)} experts, fewer than top_k"
            yield Problem(f"{key}.top_groups", text, f"raise it, or lower {key}.top_k")


@dataclass(frozen=True)
class MixtureConfig:
    """One layer's mixture of experts, its router included.

    expert  of one routed expert: its widths, scales, activation and biases
    keys    how tokens choose
    """

    expert: FeedForwardConfig
    keys: ExpertsConfig

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.expert.dim

    @property
    def scales(self) -> MatrixScales:
        """Return the standard deviations and rates of its matrices."""
        return self.expert.scales

    @property
    def shared(self) -> FeedForwardConfig | None:
        """The feed-forward that every token passes; None: there is none."""
        if not self.keys.shared:
            return None
        expert = self.expert
        return FeedForwardConfig(self.dim, self.keys.shared * expert.ffn_dim, self.scales, expert.activation, expert.bias)

    @property
    def ffn_dim(self) -> int:
        """Inner width that one token passes: its chosen experts and the shared ones."""
        return (self.keys.top_k + self.keys.shared) * self.expert.ffn_dim

    @property
    def matrices(self) -> int:
        """Count the matrix parameters: experts, shared ones, and the router."""
        return self._matrices(self.keys.count)

    @property
    def active_matrices(self) -> int:
        """Count the matrix parameters that one token is multiplied with."""
        return self._matrices(self.keys.top_k)

    def _matrices(self, experts: int) -> int:
        keys, expert = self.keys, self.expert
        router = self.router_matrices - self.cell_matrices
        return experts * self.products * self.dim * expert.ffn_dim + keys.shared * expert.matrices + router

    @property
    def router_matrices(self) -> int:
        """Count the elements of the matrices that a router multiplies with, the cell's included that layers share."""
        state = self.keys.carried_dim
        return (self.dim + self.keys.count) * state + self.cell_matrices if state else self.keys.count * self.dim

    @property
    def cell_matrices(self) -> int:
        """Count the elements of the matrices of the cell that recurrent routers share."""
        return sum(math.prod(shape) for shape in self.keys.cell_shapes.values() if len(shape) == 2)

    @property
    def products(self) -> int:
        """Count an expert's matrices: gate, up and down, or up and down."""
        return 3 if self.keys.gated else 2

    @property
    def vectors(self) -> int:
        """Count the other parameters. The bias of the choice is not trained by gradients."""
        return self._vectors(self.keys.count)

    @property
    def active_vectors(self) -> int:
        """Count the other parameters that one token passes."""
        return self._vectors(self.keys.top_k)

    def _vectors(self, experts: int) -> int:
        shared = 0 if self.shared is None else self.shared.vectors
        of_expert = self.expert.vectors - self.expert.bias * self.expert.ffn_dim * (not self.keys.gated)
        router = (self.keys.logit_bias + (self.keys.router == "relu")) * self.keys.count
        return experts * of_expert + shared + router

    @property
    def is_plain_swiglu(self) -> bool:
        """False: kernels don't fuse its products."""
        return False

    @property
    def can_fuse(self) -> bool:
        """True if kernels can compute the experts with what stands around their products inside."""
        keys, parts = self.keys, self.keys.parts
        own = parts.dispatch is not None or parts.product is not None or parts.combine is not None
        return self.expert.is_plain_swiglu and keys.gated and keys.router != "relu" and keys.capacity is None and not own

    @property
    def dispatched(self) -> int:
        """Count the elements of copies of a token made for its experts: their inputs and outputs."""
        return 2 * self.keys.top_k * self.dim
