"""Schedules that end in a decay: WSD and power."""

from __future__ import annotations

import math

from ...config.duration import Duration, Unit, Written
from ..horizon import Horizon
from ..progress import Progress
from .config import PowerConfig, WSDConfig
from .decay import WINDOWED, halving
from .schedule import Schedule

REFERENCE_LENGTH = 4096
"""Tokens of a sequence in the power schedule's paper: its batch size counts sequences of this length."""


class Decaying(Schedule):
    """A schedule with a last phase, the decay, that ends with the run.

    Set `decay_start` to decay a run early that is resumed from its stable phase, or to prolong that phase. Forms:
    exponential is 0.5^(elapsed / half_life), never below `final` (MiniCPM, arXiv 2404.06395); linear, 1-sqrt, cosine and
    exponential_to_zero go exactly from 1 to `final` over the decay (see decay.py).
    """

    def __init__(self, config: WSDConfig, peak: float, horizon: Horizon) -> None:
        super().__init__(config, peak, horizon)
        self.final = config.final
        self.decay_form = config.decay_form
        self._decay = None if config.decay_start is not None else Duration.parse(config.decay)
        self._decay_start = None if config.decay_start is None else Duration.parse(config.decay_start)
        self._half_life = self._read_half_life(config.half_life)
        self._check_decay()

    def _check_decay(self) -> None:
        """Refuse a decay that starts outside of the run or within the warm-up, as far as that is known before the run."""
        total, unit = self.horizon.total, self.horizon.unit
        if self._decay is not None:
            known = self._amount("decay", self._decay, unit) > 0  # or there is a problem already
            key, start = "schedule.decay", self.horizon.before_end(self._decay, self.horizon.begun) if known else total
        else:
            assert self._decay_start is not None
            key, start = "schedule.decay_start", self.horizon.after_start(self._decay_start, unit, self.horizon.begun)
        if start < 0:
            self._problem(key, f"the decay is longer than the run ({self.horizon.length})", "shorten it or lengthen the run")
        elif total < start < math.inf:
            self._problem(key, f"the decay would begin after the run's end ({self.horizon.length})", "begin it earlier")
        elif start < self._end_of_warmup() <= total:
            self._problem(key, f"the decay would begin before the warm-up ({self.warmup}) is over", "shorten one of them")

    def _read_half_life(self, written: Written | None) -> Duration | None:
        """Read `schedule.half_life`; None for one such that `final` is reached at the end of the decay."""
        if self.decay_form != "exponential":
            return None
        if written is not None:
            half_life = Duration.parse(written)
            if half_life.value <= 0:
                self._problem("schedule.half_life", f"{written} is no length", "give a positive one, such as '5000 steps'")
            return half_life
        return None

    def start_of_decay(self, progress: Progress) -> float:
        """Return where the decay begins, in the unit of the run's length; inf for a point that depends on batches to come."""
        if self._decay_start is not None:
            return self.horizon.after_start(self._decay_start, self.horizon.unit, progress)
        assert self._decay is not None
        return self.horizon.before_end(self._decay, progress)

    def decay_factor(self, progress: Progress) -> float:
        """Return the decay's factor, which is 1 before it begins."""
        start = self.start_of_decay(progress)
        elapsed, length = self.horizon.position(progress, self.horizon.unit) - start, self.horizon.total - start
        if elapsed <= 0:
            return 1.0
        if self.decay_form == "exponential":
            if self._half_life is not None:
                return max(self.final, self._half_life_factor(self._half_life, start, progress))
            half_life = length / math.log2(1 / self.final) if self.final < 1 else math.inf
            return max(self.final, halving(elapsed, half_life))
        part = min(1.0, elapsed / length) if length > 0 else 1.0
        return self.final + (1 - self.final) * WINDOWED[self.decay_form](part)

    def _half_life_factor(self, half_life: Duration, start: float, progress: Progress) -> float:
        """Return the factor of a decay that began at `start` with a given half-life, counted in the half-life's unit."""
        horizon = self.horizon
        if half_life.unit is Unit.FRACTION:
            half_life = Duration(half_life.value * horizon.total, horizon.unit)
        began = horizon.convert(start, horizon.unit, half_life.unit, progress)
        return halving(horizon.position(progress, half_life.unit) - began, half_life.value)


class WSD(Decaying):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): see `Decaying` for the settings of the decay."""

    def base_lr(self, progress: Progress) -> float:
        """Return the learning rate without the warm-up's factor."""
        return self.peak * self.decay_factor(progress)


class Power(Decaying):
    """The power schedule (Shen et al., arXiv 2408.13359): min(peak, β · a · n^b), then a decay.

    n is the number of tokens trained so far and β the batch in sequences of 4,096 tokens: the *current* batch, so the rate
    follows a batch size that changes during the run. The warm-up rises to the law's value at its end, the decay starts
    from the law's value at its beginning.

    The paper sets a = 4, b = −0.51 and a peak (η_max) of 0.02 under muP. Its fit of WSD's best constant rate has 4.6 in
    place of 4, with n the tokens of the whole run (`optim/scaling/laws.py`, optim.lr=auto:power).
    """

    def __init__(self, config: PowerConfig, peak: float, horizon: Horizon) -> None:
        super().__init__(config, peak, horizon)
        self.a, self.b = config.a, config.b
        # Problems where either is not known in tokens before the start. A warm-up that lies behind is.
        if not math.isfinite(horizon.after_start(self.warmup, Unit.TOKENS, horizon.begun)):
            self._amount("warmup", self.warmup, Unit.TOKENS)
        self._amount("decay", horizon.length, Unit.TOKENS)

    def law(self, tokens: float, batch: float) -> float:
        """Compute min(peak, β · a · n^b) for a batch in samples of this run's length."""
        if tokens <= 0:
            return self.peak
        sequences = batch * self.horizon.seq_len / REFERENCE_LENGTH
        return min(self.peak, sequences * self.a * tokens**self.b)

    def base_lr(self, progress: Progress) -> float:
        """Return the learning rate without the warm-up's factor."""
        first = self.horizon.after_start(self.warmup, Unit.TOKENS, progress)
        last = self.horizon.convert(self.start_of_decay(progress), self.horizon.unit, Unit.TOKENS, progress)
        tokens = min(max(self.horizon.position(progress, Unit.TOKENS), first), last)
        return self.law(tokens, progress.batch) * self.decay_factor(progress)
