"""Schedules that end in a decay of their own: WSD and power."""

from __future__ import annotations

import math
from typing import TypedDict, Unpack

from ...config.duration import Duration, Unit
from ..horizon import Horizon
from ..progress import Progress
from .decay import WINDOWED, halving
from .schedule import Schedule, Written

FORMS = ("exponential", *WINDOWED)
"""Values of `schedule.decay_form`: "exponential" halves the rate again and again, the others span the decay exactly."""

REFERENCE_LENGTH = 4096
"""Tokens of a sequence in the power schedule's paper: its batch size counts sequences of this length."""


class DecayOptions(TypedDict, total=False):
    """Keys of every schedule that ends in a decay: see `Decaying`."""

    warmup: Written
    decay: Written
    decay_form: str
    final: float
    decay_start: Written | None
    half_life: Written | None


class Decaying(Schedule):
    """A schedule with a last phase, the decay, that ends with the run.

    decay        how long it lasts
    decay_start  where it begins instead; it then lasts to the end of the run and `decay` is not read. This is how a run
                 resumed from its stable phase is brought down early, or its stable phase prolonged.
    decay_form   exponential: 0.5^(elapsed / half_life), never under `final` (MiniCPM, arXiv 2404.06395);
                 linear, 1-sqrt, cosine, exponential_to_zero: exactly from 1 to `final` over the decay (see decay.py)
    final        ratio of the learning rate at the end of the decay to that at its start
    half_life    of the exponential form; left out: such that `final` is reached at the end of the decay
    """

    def __init__(
        self,
        peak: float,
        horizon: Horizon,
        warmup: Written = 0,
        decay: Written = "10%",
        decay_form: str = "1-sqrt",
        final: float = 0.0,
        decay_start: Written | None = None,
        half_life: Written | None = None,
    ) -> None:
        super().__init__(peak, horizon, warmup)
        self.final = self._final(final)
        self.decay_form = decay_form
        if decay_form not in FORMS:
            self._problem("schedule.decay_form", f"'{decay_form}' is unknown", f"choose one of {', '.join(FORMS)}")
        if decay_start is None:
            self.decay_start = horizon.total - self._in_run("decay", decay)
            key = "schedule.decay"
        else:
            self.decay_start = self._in_run("decay_start", decay_start)
            key = "schedule.decay_start"
        self.decay_length = horizon.total - self.decay_start
        if self.decay_start < 0:
            self._problem(key, f"the decay is longer than the run ({horizon.length})", "shorten it or lengthen the run")
        elif self.decay_length < 0:
            self._problem(key, f"the decay would begin after the run's end ({horizon.length})", "begin it earlier")
        elif self.decay_start < self._known(self.warmup) <= horizon.total:
            self._problem(key, f"the decay would begin before the warm-up ({self.warmup}) is over", "shorten one of them")
        self.half_life = self._half_life(half_life)

    def _in_run(self, key: str, written: Written) -> float:
        """The setting `schedule.<key>` in the run's unit."""
        return self._amount(key, self._duration(key, written), self.horizon.unit)

    def _half_life(self, written: Written | None) -> float:
        """In the run's unit."""
        if self.decay_form != "exponential":
            if written is not None:
                fix = "leave it out, or set schedule.decay_form=exponential"
                self._problem("schedule.half_life", f"decay_form {self.decay_form} has no half-life", fix)
            return 0.0
        if written is not None:
            half_life = self._in_run("half_life", written)
            if half_life <= 0:
                self._problem("schedule.half_life", f"{written} is no length", "give a positive one, such as '5000 steps'")
            return half_life
        if self.final <= 0:
            self._problem(
                "schedule.half_life",
                "an exponential decay never reaches 0, so its half-life must be given",
                "set schedule.half_life, or schedule.final to a ratio above 0, or schedule.decay_form=exponential_to_zero",
            )
            return 0.0
        return self.decay_length / math.log2(1 / self.final) if self.final < 1 else math.inf

    def decayed(self, progress: Progress) -> float:
        """The decay's factor, which is 1 before it begins."""
        elapsed = self.horizon.position(progress, self.horizon.unit) - self.decay_start
        if elapsed <= 0:
            return 1.0
        if self.decay_form == "exponential":
            return max(self.final, halving(elapsed, self.half_life))
        part = min(1.0, elapsed / self.decay_length) if self.decay_length > 0 else 1.0
        return self.final + (1 - self.final) * WINDOWED[self.decay_form](part)


class WSD(Decaying):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): see `Decaying` for the settings of the decay."""

    def settled(self, progress: Progress) -> float:
        """See the class."""
        return self.peak * self.decayed(progress)


class Power(Decaying):
    """The power schedule (Shen et al., arXiv 2408.13359): min(peak, β · a · n^b), then a decay.

    n is the number of tokens trained so far and β the batch in sequences of 4,096 tokens: the *current* batch, so the rate
    follows a batch size that changes during the run. The warm-up rises to the law's value at its end, the decay starts
    from the law's value at its beginning.

    a, b  of the law; the paper's fit is a = 4, b = −0.51, with a peak (η_max) of 0.02 under muP
    """

    def __init__(
        self, peak: float, horizon: Horizon, a: float = 4.0, b: float = -0.51, **options: Unpack[DecayOptions]
    ) -> None:
        settings: DecayOptions = {"decay_form": "exponential_to_zero", **options}
        super().__init__(peak, horizon, **settings)
        self.a, self.b = a, b
        if not 0 < a < math.inf:
            self._problem("schedule.a", f"{a:g} makes no learning rate", "use a number above 0; the paper's fit is 4")
        if not -math.inf < b <= 0:
            self._problem("schedule.b", f"{b:g} does not let the rate fall", "use 0 or less; the paper's fit is -0.51")
        self._first = self._amount("warmup", self.warmup, Unit.TOKENS)
        start = Duration(max(0.0, self.decay_start), horizon.unit)
        self._last = self._amount("decay", start, Unit.TOKENS)

    def law(self, tokens: float, batch: float) -> float:
        """min(peak, β · a · n^b) for a batch in samples of this run's length."""
        if tokens <= 0:
            return self.peak
        sequences = batch * self.horizon.seq_len / REFERENCE_LENGTH
        return min(self.peak, sequences * self.a * tokens**self.b)

    def settled(self, progress: Progress) -> float:
        """See the class."""
        tokens = min(max(progress.tokens, self._first), self._last)
        return self.law(tokens, progress.batch) * self.decayed(progress)
