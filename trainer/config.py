"""Config of `trainer`: length of the run, the step, evaluation, and hooks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config.duration import Duration, Unit
from ..config.keys import Side, key
from ..config.problems import Problem

ON_BAD_STEP = ("skip", "rewind", "stop")
ACTIVATIONS = ("none", "selective", "full", "offload", "auto")
MASTERS = ("full", "bf16_stochastic", "bf16_kahan")
FLOAT8 = ("none", "tensorwise", "rowwise")
"""One scale for a whole tensor (fastest), or one for each row and column (closer to bf16)."""


@dataclass(frozen=True)
class TrainerConfig:
    """Length of the run, and how its loop steps and evaluates."""

    SIDE: ClassVar[Side] = Side.RECIPE

    steps: int | None = key(None, "length of the run in steps, typed as 2000 or 2k; give this or tokens", unit=Unit.STEPS)
    tokens: int | None = key(None, "length of the run in tokens, typed as 1500 or 1.5k; give this or steps", unit=Unit.TOKENS)
    max_grad_norm: float | None = key(1.0, "clip the global gradient norm to this; null: never")
    on_bad_step: str = key(
        "skip",
        "of a step whose loss or gradient norm is not finite or a spike: skip its update, rewind (leave out its samples; after"
        " a spike, from the last checkpoint on), or stop with the weights before it",
    )
    spike_sigmas: float | None = key(
        6.0,
        "a step is a spike if its loss, or its gradient norm's logarithm, is as many robust standard deviations above the"
        " median of the last 128 accepted steps; null: no finite step is",
    )
    bad_step_limit: int = key(
        10,
        "bad steps in a row after which spikes count as a new level and all else ends the run; also the most rewinds",
    )
    compare_replicas_every: int | None = key(
        50,
        "compare all copies of weights and optimizer state every so many steps, and before saves; 0: before saves only;"
        " null: never",
        Side.HABIT,
    )
    eval_every: int | float | str | None = key(
        100, "evaluate every so many steps, or after any duration ('4k samples', '5%'); null: only at the end; 0: never"
    )
    eval_samples: int = key(64, "samples of the validation set per evaluation")
    activation: str = key(
        "none",
        "what the forward pass keeps for the backward pass: none (keep all), selective, full or offload; auto: the fastest of"
        " the first three that a plan fits into the GPUs that the run is started on",
        Side.PLACEMENT,
    )
    activation_budget: float | None = key(
        None,
        "with activation=none: share of it, in (0, 1], that may be kept; the rest is computed again, as little as can be"
        " (selectively in some blocks, then fully in some); null: all",
        Side.PLACEMENT,
    )
    compile: bool = key(False, "torch.compile each block", Side.PLACEMENT)
    float8: str = key(
        "none", "matrix products of the blocks in float8 with scales per tensor (tensorwise) or per row and column (rowwise)"
    )
    masters: str = key(
        "full",
        "what is kept of bf16 weights between updates: full (fp32 masters), bf16_stochastic (the weights alone, rounded by"
        " chance) or bf16_kahan (the weights, and what rounding leaves in bf16)",
    )
    profile_step: int | None = key(
        None, "profile this step: a table of kernels and a trace in <output_dir>/profile; null: of none", Side.HABIT
    )
    hooks: list[Any] = key([], "your own hooks, each a node with a `_target_`", Side.HABIT)
    sample_prompt: str | None = key(None, "text the model continues at the end of the run; null: none", Side.HABIT)
    sample_tokens: int = key(200, "how many tokens it adds to sample_prompt", Side.HABIT)

    def problems(self, key: str = "trainer") -> list[Problem]:
        """Return the problems of the values."""
        return [*self._length_problems(key), *self._evaluation_problems(key), *self._step_problems(key)]

    def _length_problems(self, key: str) -> Iterator[Problem]:
        if self.steps is None and self.tokens is None:
            fix = f"give {key}.steps or {key}.tokens"
            yield Problem(f"{key}.steps", "the run has no length", fix, unless=(f"{key}.steps", f"{key}.tokens"))
        if self.steps is not None and self.tokens is not None:
            yield Problem(f"{key}.steps", f"{key}.tokens says the run's length too", "set one of them to null")
        for name, length in (("steps", self.steps), ("tokens", self.tokens)):
            if length is not None and length < 1:
                yield Problem(f"{key}.{name}", f"{length} is not a length", "use 1 or more")

    def _evaluation_problems(self, key: str) -> Iterator[Problem]:
        if self.eval_samples < 1:
            yield Problem(f"{key}.eval_samples", f"{self.eval_samples} evaluates nothing", f"use {key}.eval_every=0 for never")
        if self.sample_tokens < 1:
            yield Problem(f"{key}.sample_tokens", f"{self.sample_tokens} is no text", f"use {key}.sample_prompt=null for none")
        if self.eval_every is None:
            return
        fix = "use 0 for never, null for at the end"
        try:
            length = Duration.parse(self.eval_every)
        except ValueError as error:
            reason, _, forms = str(error).partition("; ")
            yield Problem(f"{key}.eval_every", reason, f"{forms}; {fix}" if forms else fix)
            return
        if length.value == 0 and self.eval_every != 0:
            yield Problem(f"{key}.eval_every", f"'{self.eval_every}' is no length", fix)

    def _guard_problems(self, key: str) -> Iterator[Problem]:
        if self.on_bad_step not in ON_BAD_STEP:
            yield Problem(f"{key}.on_bad_step", f"there is no '{self.on_bad_step}'", f"use {', '.join(ON_BAD_STEP)}")
        if self.spike_sigmas is not None and not self.spike_sigmas > 0:
            fix = "use 4 or more, or null for no spikes"
            yield Problem(f"{key}.spike_sigmas", f"{self.spike_sigmas} makes every second step a spike", fix)
        if self.bad_step_limit < 1:
            fix = f"use 1 or more; {key}.on_bad_step=stop ends at the first"
            yield Problem(f"{key}.bad_step_limit", f"{self.bad_step_limit} allows no bad step", fix)
        every = self.compare_replicas_every
        if every is not None and every < 0:
            fix = "use 0 for before saves, null for never"
            yield Problem(f"{key}.compare_replicas_every", f"{every} is no number of steps", fix)

    def _step_problems(self, key: str) -> Iterator[Problem]:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            yield Problem(f"{key}.max_grad_norm", f"{self.max_grad_norm} stops all learning", "use null to never clip")
        yield from self._guard_problems(key)
        step, last = self.profile_step, self.steps
        if step is not None and not 1 <= step <= (last or step):
            length = f" of {last}" if last else ""
            yield Problem(f"{key}.profile_step", f"there is no step {step}{length}", "count from 1; null: none")
        if self.activation not in ACTIVATIONS:
            yield Problem(f"{key}.activation", f"there is no '{self.activation}'", f"use {', '.join(ACTIVATIONS)}")
        if self.masters not in MASTERS:
            yield Problem(f"{key}.masters", f"there is no '{self.masters}'", f"use {', '.join(MASTERS)}")
        if self.float8 not in FLOAT8:
            yield Problem(f"{key}.float8", f"there is no '{self.float8}'", f"use {', '.join(FLOAT8)}")
        budget = self.activation_budget
        if budget is not None and not 0 < budget <= 1:
            yield Problem(f"{key}.activation_budget", f"{budget} is not a share", "use a number in (0, 1], or null")
        elif budget is not None and self.activation != "none":
            fix = f"use {key}.activation=none: the budget chooses among the others"
            yield Problem(f"{key}.activation_budget", f"{key}.activation={self.activation} leaves nothing to choose", fix)
