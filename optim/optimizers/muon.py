"""Muon and NorMuon: steps whose singular values are equal, by Newton–Schulz iteration on whole matrices."""

# pyright: reportPrivateImportUsage=false
# torch does not export its operations on lists (_foreach_…), which its own optimizers use.

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from .matrix import MatrixOptimizer
from .matrix_config import MuonConfig, NorMuonConfig
from .newton_schulz import orthogonalize_all
from .newton_schulz_forms import cost
from .parameters import Matrix, NamedParameter, Shards


class Muon(MatrixOptimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    m ← μ·m + (1 − μ)·g;  u = (1 − μ)·g + μ·m with Nesterov's momentum, m without;  w ← w − lr·(s·orthogonal(u) + decay·w)

    The factor s of a matrix (rows × columns = outputs × inputs), by `scale`:

    match_rms_adamw  0.2·√max(rows, columns): steps are as large as AdamW's, for the same rates and decay (arXiv 2502.16982)
    original         √max(1, rows/columns)
    mup              √(rows/columns): the spectral norm that lets the best rate carry over widths (arXiv 2310.17813)

    What travels between ranks has the dtype of the forward pass. The products of the iteration have it, too, but in
    place of bf16 they are in fp16 on a GPU, and in fp32 elsewhere. With `per_head` each head's rows of a query, key or value
    projection are a matrix, and so is each part of a projection that joins several.
    """

    can_skip = True

    def __init__(self, config: MuonConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        self._momentum, self._nesterov, self._scale, self._steps = (
            config.momentum,
            config.nesterov,
            config.scale,
            config.ns_steps,
        )
        self.keeps_lr_scale = config.scale == "match_rms_adamw"
        self.divides_parts = config.per_head
        super().__init__(config, parameters, shards, functools.partial(cost, steps=config.ns_steps))
        computed = {parameter.compute or parameter.tensor.dtype for parameter in self.hidden}
        assert len(computed) <= 1, f"matrices of one model are computed in {computed}"
        self._dtype = next(iter(computed), torch.float32)

    def updates(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Orthogonalise the momenta."""
        return self.matrices.map(self._momenta(gradients), self._direction, self._dtype)

    def _momenta(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Move the momenta, and return what is orthogonalised: finite also where the step is not taken."""
        states = [self.state[parameter.tensor] for parameter in self.hidden]
        for state, parameter in zip(states, self.hidden, strict=True):
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter.tensor)
        momenta: list[torch.Tensor] = [state["momentum"] for state in states]
        if self.fused_step:
            return self._momenta_in_one_pass(momenta, gradients)
        complete = self.complete_gradients(gradients)
        self.move(momenta, complete, 1 - self._momentum)
        if not self._nesterov:
            return momenta
        return list(torch._foreach_lerp(complete, momenta, self._momentum))

    def _momenta_in_one_pass(
        self, momenta: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """Do so by a kernel, which writes what is orthogonalised in the dtype in which it travels."""
        from ...kernels.triton_matrix_update import momentum_update

        results: list[torch.Tensor] = []
        for momentum, gradient in zip(momenta, gradients, strict=True):
            results.append(torch.empty_like(momentum, dtype=self._dtype))
            gradient = torch.zeros_like(momentum) if gradient is None else gradient
            pending = self.gradient_scale, self.skip
            momentum_update(momentum, gradient, results[-1], *pending, beta=self._momentum, nesterov=self._nesterov)
        return results

    def _direction(self, matrices: Sequence[Matrix], momenta: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return orthogonalize_all(momenta, self._steps, self._factor)

    def _factor(self, rows: int, columns: int) -> float:
        if self._scale == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        ratio = rows / columns
        return math.sqrt(max(1.0, ratio) if self._scale == "original" else ratio)


class NorMuon(Muon):
    """Muon whose rows (neurons) are normalised by a second moment each (arXiv 2510.05491).

    o = orthogonal(u);  v ← β₂·v + (1 − β₂)·mean over columns of o²;  ô = o / (√v + eps)

    The step is ô, scaled to the root mean square that Muon's has under `scale`. A matrix's v (rows,) is held by its owner.
    """

    def __init__(self, config: NorMuonConfig, parameters: Sequence[NamedParameter], shards: Shards) -> None:
        super().__init__(config, parameters, shards)
        self._second, self._normuon_eps = config.beta2, config.eps

    def _direction(self, matrices: Sequence[Matrix], momenta: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        results: list[torch.Tensor] = []
        for matrix, orthogonal in zip(matrices, orthogonalize_all(momenta, self._steps), strict=True):
            moments = self.owned_array(matrix, "row_sq", (matrix.shape[0],))
            values = orthogonal.to(moments.dtype)
            self.move([moments], [values.square().mean(1)], 1 - self._second)
            rescaled = values / (moments.sqrt() + self._normuon_eps)[:, None]
            rows, columns = matrix.shape
            # Muon's root mean square: an orthogonal matrix's is 1/√max(rows, columns).
            wanted = self._factor(rows, columns) * math.sqrt(min(rows, columns))
            norm = rescaled.norm()
            results.append(rescaled * torch.where(norm > 0, wanted / norm, 0.0))
        return results
