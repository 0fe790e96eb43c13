"""Time of single kernels on a GPU, from its data sheet and the shares of it that kernels reach. Imports no torch.

A kernel's rate is e · x / (x + x₀): the share e of the peak that an endless one reaches, and the size x₀ at which it reaches
half of that. A product's memory traffic is added to its arithmetic, which hides only a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cluster import ClusterConfig

HIDDEN = 0.5
"""Part of a product's memory traffic that its arithmetic hides."""


@dataclass(frozen=True)
class Kernels:
    """Times of kernels in seconds.

    precision  that products compute in
    """

    cluster: ClusterConfig
    precision: str

    @property
    def unit(self) -> int:
        """Bytes of an element that is computed with."""
        return {"bf16": 2, "fp32": 4, "fp64": 8}[self.precision]

    def pointwise(self, size: float) -> float:
        """Return the seconds in which pointwise kernels read and write `size` bytes."""
        rates = self.cluster.rates
        return size / (self.cluster.bandwidth * 1e12 * rates.memory * rates.speed)

    def product(self, rows: float, out: float, inner: float, *, groups: int = 1) -> float:
        """Return the seconds of a product (rows, inner) × (inner, out).

        groups: matrices of this shape among which the rows are dealt (a mixture's experts).
        """
        rates = self.cluster.rates
        if not rows * out * inner:
            return 0.0
        # What does not fill the GPU takes as long as what does.
        arithmetic = 2 * inner * (rows * out + rates.half_area) / (self.cluster.peak(self.precision) * rates.products)
        if groups > 1:
            arithmetic *= self._grouped(rows / groups)
        traffic = self.unit * (rows * inner + groups * inner * out + rows * out)
        return arithmetic / rates.speed + self.pointwise((1 - HIDDEN) * traffic)

    def _grouped(self, rows: float) -> float:
        """Return how much longer products of so many rows each take together than one of all rows."""
        return (rows + 64) / rows / self.cluster.rates.grouped

    def float8_product(self, rows: float, out: float, inner: float, *, groups: int = 1) -> float:
        """Return the seconds of a product in float8, the casts of its factors included. groups: see `product`."""
        rates = self.cluster.rates
        peak = self.cluster.peak("fp8") or self.cluster.peak("bf16")
        arithmetic = 2 * inner * (rows * out + rates.half_area) / (peak * rates.float8)
        if groups > 1:
            arithmetic *= self._grouped(rows / groups)
        casts = 5 * (rows * inner + groups * inner * out)  # read for the scale, read, and written in a byte
        traffic = rows * inner + groups * inner * out + 2 * rows * out
        return arithmetic / rates.speed + self.pointwise(casts + (1 - HIDDEN) * traffic)

    def attention(self, flops: float, width: int, length: float, *, backward: bool = False) -> float:
        """Return the seconds of fused attention.

        flops: of scores and weighted sums that are not masked; width: of a head; length: mean positions of a document.
        backward: 2.5 times the forward pass's products, since scores are computed again (arXiv 2205.14135).
        """
        rates = self.cluster.rates
        share = rates.attention_backward if backward else rates.attention
        share *= (128 + rates.half_width) / 128 * width / (width + rates.half_width)
        share *= length / (length + rates.half_length)
        return flops * (2.5 if backward else 1.0) / (self.cluster.peak(self.precision) * share * rates.speed)
