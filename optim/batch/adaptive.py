"""Batch-size controllers that measure: the tests of adaptive sampling, the noise scale, and the critical batch of a loss."""

from __future__ import annotations

import math
from typing import Any

from ..horizon import Horizon
from ..progress import Progress
from ..scaling.laws import critical_batch
from .config import AdaptiveConfig, AugmentedConfig, CriticalLossConfig, NormTestConfig
from .controller import Controller
from .statistics import GradientStatistics, MovingMeans


class Adaptive(Controller):
    """Base of the measuring controllers: measurements move a target within bounds.

    samples   the size at the start, and the smallest
    max       the largest size
    multiple  sizes in between are multiples of this. Unset, of `micro` where gradients are measured, because the
              micro-batches are then the workers of the statistics; of 1 elsewhere
    interval  steps between decisions; with no smoothing, only those steps are measured
    ema       weight of the past in the moving means that decisions are taken from; 0: the newest measurement alone
    growth    a decision changes the size at most by this factor, up to rounding; None: no limit
    shrink    whether the size may fall again
    """

    def __init__(self, config: AdaptiveConfig, horizon: Horizon) -> None:
        super().__init__(config, horizon)
        self.max, self.multiple = config.max, config.multiple or (config.micro_size if self.needs_statistics else 1)
        self.interval, self.growth, self.shrink, self.eta = config.interval, config.growth, config.shrink, config.eta
        self._means = MovingMeans(config.ema)
        self._target = float(self.samples)

    def proposed_batch(self) -> float | None:
        """Return the size that the measurements so far ask for, perhaps infinite; None before they say anything."""
        raise NotImplementedError

    def measure(self, statistics: GradientStatistics | None, loss: float, progress: Progress) -> dict[str, float] | None:
        """Return the numbers to smooth; None where this step has none."""
        raise NotImplementedError

    def measures(self, progress: Progress) -> bool:
        """Return whether to measure: every step if means are smoothed, otherwise the steps before a decision."""
        return self.needs_statistics and (self._means.decay > 0 or (progress.step + 1) % self.interval == 0)

    def next_batch(self, progress: Progress) -> int:
        """Return the target, rounded to a size that a step may have."""
        return self.rounded(self._target)

    def rounded(self, size: float) -> int:
        """Round up to a size that a step may have: `samples`, `max`, or a multiple of `multiple` in between.

        Where gradients are measured and the micro-batch has grown, it is also a multiple of that.
        """
        if size <= self.samples:
            return self.samples
        unit = self.multiple
        if self.needs_statistics and size < self.max and (micro := self.micro_at(int(size))) > self.micro:
            unit = math.lcm(unit, micro)
        return self.max if size >= self.max else min(self.max, math.ceil(size / unit) * unit)

    def observe(self, statistics: GradientStatistics | None, loss: float, progress: Progress) -> None:
        """Smooth the measurement and, every `interval` steps, move the target."""
        numbers = self.measure(statistics, loss, progress)
        if numbers is None or not all(math.isfinite(number) for number in numbers.values()):
            return  # a step that diverged says nothing about the right batch
        self._means.update(numbers)
        proposed = self.proposed_batch() if progress.step % self.interval == 0 else None
        if proposed is None:
            return
        now = float(self.next_batch(progress))
        most = self.max if self.growth is None else min(self.max, now * self.growth)
        least = now
        if self.shrink:
            least = self.samples if self.growth is None else max(self.samples, now / self.growth)
        self._target = min(most, max(least, proposed))

    def state_dict(self) -> dict[str, Any]:
        """Return the target before rounding, and the moving means."""
        return {"kind": type(self).__name__, "target": self._target, "means": self._means.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state. From a controller of another kind, only the size that it had reached is restored, if any."""
        self._target = float(state.get("target", self.samples))
        if state.get("kind") == type(self).__name__:
            self._means.load_state_dict(state["means"])


class StatisticsController(Adaptive):
    """Base of the controllers that decide from gradient statistics."""

    needs_statistics = True

    def measure(self, statistics: GradientStatistics | None, loss: float, progress: Progress) -> dict[str, float] | None:
        """Return the second moments of the gradient, from unbiased estimates where there are such."""
        if statistics is None or not statistics.finite:
            return None
        numbers = {
            "variance": statistics.variance,
            "signal": statistics.signal,
            "square": statistics.batch_square,
            "spread": statistics.spread,
        }
        if self.needs_projections:
            if statistics.projection_square is None:
                raise ValueError(
                    f"batch={type(self).__name__}: this engine does not measure the products of the workers' gradients "
                    "with their mean; choose batch=norm_test, or parallel.engine=torch"
                )
            numbers["along"] = statistics.projection_variance
            numbers["across"] = statistics.orthogonal_variance
        return numbers

    @property
    def noise_scale(self) -> float | None:
        """tr Σ / ‖E g‖² of the moving means, in samples; infinite where no signal is seen; None before a measurement."""
        return _ratio(self._means["variance"], self._means["signal"]) if "variance" in self._means else None


def _ratio(noise: float, signal: float) -> float:
    """Divide noise by signal; any noise over a signal of 0 or less is infinite."""
    if noise <= 0:
        return 0.0
    return noise / signal if signal > 0 else math.inf


class NormTest(StatisticsController):
    """The norm test of AdAdaGrad (arXiv 2402.11215), from workers' gradients as in DDP-Norm and FSDP-Norm (2412.21124).

    The batch b passes if tr Σ / b ≤ η² ‖g‖². Otherwise it proposes the smallest batch that would pass.

    eta       the noise allowed in the batch's gradient, relative to its norm: smaller asks for larger batches
    unbiased  compare with the unbiased ‖E g‖², not with ‖g‖², in which the noise itself counts as signal
    literal   compare the variance of the workers' means with the threshold for samples, as the papers' text can be read;
              it asks for batches smaller by the factor of samples per worker
    """

    def __init__(self, config: NormTestConfig, horizon: Horizon) -> None:
        super().__init__(config, horizon)
        self.unbiased, self.literal = config.unbiased, config.literal

    def proposed_batch(self) -> float | None:
        """Return tr Σ / (η² ‖g‖²)."""
        noise = self._means["spread" if self.literal else "variance"]
        return _ratio(noise, self._means["signal" if self.unbiased else "square"]) / self.eta**2


class InnerProduct(StatisticsController):
    """The inner-product test (Bollapragada et al., arXiv 1710.11258; arXiv 2402.11215): noise along the gradient only.

    The batch b passes if Var⟨g_i, g⟩ / b ≤ η² ‖g‖⁴; η is the papers' θ. The products are taken over the whole gradient
    vector, covariances between tensors included.
    """

    needs_projections = True

    def proposed_batch(self) -> float | None:
        """Return Var⟨g_i, g⟩ / (η² ‖g‖⁴)."""
        return _ratio(self._means["along"], self._means["square"] ** 2) / self.eta**2


class Augmented(InnerProduct):
    """The augmented inner-product test, which also bounds the noise orthogonal to the gradient.

    nu  the orthogonality test passes if tr Cov(g_i − ⟨g_i, g⟩ g / ‖g‖²) / b ≤ ν² ‖g‖²
    """

    def __init__(self, config: AugmentedConfig, horizon: Horizon) -> None:
        super().__init__(config, horizon)
        self.nu = config.nu

    def proposed_batch(self) -> float | None:
        """Return the larger of the two tests' batches."""
        along = _ratio(self._means["along"], self._means["square"] ** 2) / self.eta**2
        return max(along, _ratio(self._means["across"], self._means["square"]) / self.nu**2)


class NoiseScale(StatisticsController):
    """The batch follows the simple noise scale tr Σ / ‖E g‖² (McCandlish et al., arXiv 1812.06162).

    eta  the size, as a multiple of the noise scale: at 1 a step makes half the progress that an infinite batch would
    """

    def proposed_batch(self) -> float | None:
        """Return η × noise scale."""
        noise_scale = self.noise_scale
        return None if noise_scale is None else self.eta * noise_scale


class CriticalLoss(Adaptive):
    """The batch follows the critical batch of the loss reached, B_crit(L) = B_* / L^(1/α_B) tokens.

    From Kaplan et al., arXiv 2001.08361, and arXiv 2403.06563. Needs no gradient statistics.

    eta     the size, as a multiple of the critical batch
    tokens  B_*, in tokens; it depends on data and tokenizer, so fit it to your own runs (`meshloom fit`)
    alpha   α_B
    """

    needs_loss = True

    def __init__(self, config: CriticalLossConfig, horizon: Horizon) -> None:
        super().__init__(config, horizon)
        self.tokens, self.alpha = config.tokens, config.alpha

    def measure(self, statistics: GradientStatistics | None, loss: float, progress: Progress) -> dict[str, float] | None:
        """Return the loss."""
        return {"loss": loss}

    @property
    def noise_scale(self) -> float | None:
        """The critical batch in samples, to which the noise scale is an approximation; None before a measurement."""
        if "loss" not in self._means or self._means["loss"] <= 0:
            return None
        return critical_batch(self._means["loss"], self.tokens, self.alpha) / self.horizon.seq_len

    def proposed_batch(self) -> float | None:
        """Return η × B_crit(loss)."""
        critical = self.noise_scale
        return None if critical is None else self.eta * critical
