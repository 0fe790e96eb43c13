"""Balance of a run's experts: prices from the shares of the global batch, and the biases of loss-free balance.

Shape legend: L layers with a mixture, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from ...models.config import DecoderConfig
from ...models.mixture.balance_config import BalanceConfig
from ...models.mixture.charges import OTHERS, Rates, share_of
from ...models.mixture.ledger import Ledger, Routing
from ...models.protocol import Model
from ...optim.optimizers.own_arrays import RUN
from ..box import Box
from ..fragment import Fragment
from ..mesh import Mesh
from .chunk_rate import ChunkRate


class MeshSums:
    """Sums of counts over the ranks of a mesh. Implements `models.mixture.charges.CountSums`."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def of_rows(self, counts_BE: torch.Tensor, rows_cut: bool) -> torch.Tensor:
        """Sum over context-parallel ranks, and over tensor-parallel ones where these have slices of the same rows."""
        return self._sum(counts_BE, "cp", "tp") if rows_cut else self._sum(counts_BE, "cp")

    def of_micro_batch(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Sum over context- and tensor-parallel ranks."""
        return self._sum(counts_E, "cp", "tp")

    def of_pass(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks of the pipeline's stage."""
        return self._sum(counts_E, "stage")

    def _sum(self, counts: torch.Tensor, *axes: str) -> torch.Tensor:
        total = counts.clone()
        with self._mesh.compute_time.collective_waiting():
            for axis in axes:
                self._mesh.sum(total, axis)
        return total


class ExpertBalance:
    """The balance of all mixtures of a run. Every rank has the whole table of shares; a stage has its layers' biases.

    shares_LE    E times each expert's share of the assignments, averaged over past steps: 1 for an even load, as before the
                 first step
    assignments  (L, E) of the last step or evaluation, summed over all ranks, on the device; fp64. None: nothing was routed
    """

    def __init__(self, shape: DecoderConfig, stages: Sequence[Model], mesh: Mesh, config: BalanceConfig) -> None:
        """stages: this rank's, on their device."""
        self._config, self._mesh, self._layers = config, mesh, shape.mixture_layers()
        self._top_k, self._experts = shape.experts.top_k, shape.experts.count
        coefficient = config.global_coefficient
        self._prefix = coefficient if config.counts == "prefix" else 0.0
        in_parts = (self._prefix, config.micro_batch, config.sequence)
        rates = Rates(*in_parts, config.z_loss, config.locality, config.steepness, config.chunk_length)
        self._varies, self._whole_rows = shape.experts.router == "relu", mesh.layout.cp == mesh.layout.tp == 1
        self._chunks = ChunkRate(config, mesh.device) if self._varies or config.chunk_sparsity else None
        self.ledger = Ledger(self._layers, self._experts, mesh.device, rates, MeshSums(mesh))
        self._evaluated = Ledger(self._layers, self._experts, mesh.device, Rates(chunk_length=config.chunk_length))
        self.assignments: torch.Tensor | None = None
        self._unlearned_LE: torch.Tensor | None = None  # the counts of a step that has not been updated
        self._chunk_loss = torch.zeros((), dtype=torch.float64, device=mesh.device)  # of the same step
        self.shares_LE = torch.ones(len(self._layers), self._experts, dtype=torch.float64, device=mesh.device)
        held = {layer for stage in stages for layer in stage.block_modules()}
        self._held = [layer for layer in self._layers if layer in held]
        self._biases: Mapping[str, torch.Tensor] = {
            name: bias for stage in stages for name, bias in stage.saved_buffers().items()
        }
        self._active: Ledger | None = None

    @property
    def counts_first(self) -> bool:
        """True if a step begins with a forward pass that only counts."""
        return self._config.counts == "exact" and self._config.global_coefficient > 0

    def routing(self, counted_BS: torch.Tensor) -> Routing | None:
        """Return a micro-batch's access to the ledger of the step, or of the evaluation; None outside of both."""
        return None if self._active is None else Routing(self._active, counted_BS)

    def run_evaluation(self, global_tokens: torch.Tensor, evaluate: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return `evaluate`'s result, and count what it routes, apart from the step's counts. Nothing learns of it."""
        self._active = self._evaluated
        try:
            self._evaluated.begin(global_tokens, None)
            total = evaluate()
        finally:
            self._active = None
        self.assignments = self._whole_sums(self._evaluated)[:, : self._experts]
        return total

    def run_step(
        self, global_tokens: torch.Tensor, count: Callable[[], object], accumulate: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run a step's passes with the prices of the balance. Returns `accumulate`'s result, and sums to report.

        count: runs forward passes over the step's micro-batches; called where prices need the counts of this very step.
        """
        price_LE = None
        self._active = self.ledger
        try:
            if self.counts_first:
                self.ledger.begin(global_tokens, None)
                count()
                price_LE = share_of(self._whole_sums(self.ledger)[:, : self._experts])
            elif not self._prefix and self._config.global_coefficient:
                price_LE = self.shares_LE
            if price_LE is not None:
                price_LE = self._config.global_coefficient * price_LE
            chunk_rate = None if self._chunks is None or not self._config.chunk_sparsity else self._chunks.rate
            self.ledger.begin(global_tokens, price_LE, chunk_rate)
            total = accumulate()
        finally:
            self._active = None
        sums_LN = self._whole_sums(self.ledger)
        self.assignments = self._unlearned_LE = sums_LN[:, : self._experts]
        self._chunk_loss = sums_LN[:, 2 * self._experts + OTHERS.index("chunk")].mean() / global_tokens
        return total, self._report(sums_LN, global_tokens)

    def _whole_sums(self, ledger: Ledger) -> torch.Tensor:
        """Sum a ledger over all ranks: each token and layer is tallied on one of them."""
        return self._mesh.sum(ledger.sums_LN.clone())

    def forget(self) -> None:
        """Discard the counts of the last step if nothing has learned of them."""
        self._unlearned_LE = None

    @torch.no_grad()
    def learn(self, skip: torch.Tensor | None = None) -> None:
        """Take the last step's counts into the average of shares, and move the biases of the choice towards even loads.

        The coefficient of chunk sparsity follows the step's objective.

        skip: 1 on the device, if nothing shall be learned; None: 0
        """
        if self._unlearned_LE is None:  # an update without a step, which only makes the optimizer's state
            return
        counts_LE, self._unlearned_LE = self._unlearned_LE, None
        taken = torch.ones_like(counts_LE[0, 0]) if skip is None else 1 - skip.to(counts_LE.dtype)
        self.shares_LE.lerp_(share_of(counts_LE), (1 - self._config.keep) * taken)
        if self._chunks is not None:
            self._chunks.observe(self._chunk_loss, taken)
        if self._config.bias_rate:
            for layer in self._held:
                counts_E = counts_LE[self._layers.index(layer)]
                move_E = (counts_E.mean() - counts_E).sign() * (self._config.bias_rate * taken)
                bias_E = self._biases[f"layers.{layer}.ffn.router.bias"]
                bias_E.add_(move_E.to(bias_E.dtype))

    def _report(self, sums_LN: torch.Tensor, global_tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the numbers of each layer, by name."""
        counts_LE, mass_LE, others_LO = sums_LN.split([self._experts, self._experts, len(OTHERS)], dim=1)
        load_LE = share_of(counts_LE)
        lbl_L = (load_LE * mass_LE).sum(-1) / global_tokens
        others = dict(zip(OTHERS, (others_LO / global_tokens).unbind(1), strict=True))
        numbers = {
            "lbl": lbl_L,
            "load_max": load_LE.amax(-1),
            "violation": load_LE.amax(-1) - 1,
            "idle": (counts_LE == 0).double().sum(-1),
            "z": others["z"],
            "entropy": others["entropy"],
            "dropped": others["dropped"] / self._top_k,
        }
        if self._varies:
            numbers |= {
                "active": counts_LE.sum(-1) / global_tokens,
                "token_sparsity": 1 - counts_LE.sum(-1) / global_tokens / self._experts,
            }
        if self._varies and self._whole_rows:
            numbers |= {"chunk_sparsity": 1 - others["chunk_active"], "chunk_loss": others["chunk"]}
        if self._config.locality:
            numbers["locality_loss"] = others["locality"]
        numbers |= {f"lbl_{name}": others[name] for name in ("micro_batch", "sequence") if getattr(self._config, name)}
        return {
            f"experts/{layer}/{name}": values_L[row]
            for row, layer in enumerate(self._layers)
            for name, values_L in numbers.items()
        }

    def fragments(self) -> Iterator[Fragment]:
        """Yield the shares and the biases of this rank's layers, and the coefficient of chunk sparsity, live."""
        for layer in self._held:
            shares_E = self.shares_LE[self._layers.index(layer)]
            yield Fragment(f"layers.{layer}.ffn.router.shares", RUN, (self._experts,), Box.whole(shares_E.shape), shares_E)
        if self._chunks is not None:
            state_4 = self._chunks.state_4
            yield Fragment("router.chunk_rate", RUN, (4,), Box.whole(state_4.shape), state_4)
        for name, bias_E in self._biases.items():
            yield Fragment(name, "weight", tuple(bias_E.shape), Box.whole(bias_E.shape), bias_E)
