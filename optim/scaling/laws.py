"""Scaling laws: the best learning rate, batch and loss that papers found, with units, sources and fitted ranges.

N is a number of parameters, D of tokens, L a loss in nats per token. Which N, and which tokenizer and data stand behind L,
differs between papers: see each law. fitting.py fits laws to your own runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..batch.config import KAPLAN_ALPHA, KAPLAN_TOKENS
from ..schedules.wsd import REFERENCE_LENGTH


@dataclass(frozen=True)
class Law:
    """The description of a law: its formula, unit, source and range.

    formula  as the paper writes it, with its constants
    unit     of its value
    source   where it comes from
    fitted   what it was fitted on, in words
    ranges   argument → lowest and highest value it was fitted on, where that is known
    """

    formula: str
    unit: str
    source: str
    fitted: str
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def extrapolated(self, **arguments: float) -> list[str]:
        """Return the names of the arguments that lie outside of what the law was fitted on."""
        return [
            name
            for name, value in arguments.items()
            if name in self.ranges and not self.ranges[name][0] <= value <= self.ranges[name][1]
        ]


STEP_LR = Law(
    "1.79 · N^−0.713 · D^0.307",
    "peak learning rate (AdamW, cosine-like schedule down to a fixed 1e-5)",
    "step law, arXiv 2503.04715",
    "N (without embeddings) 6e7 to 1.1e9, D 2e9 to 1e11, sequences of 2,048",
    {"N": (6e7, 1.1e9), "D": (2e9, 1e11)},
)
STEP_BATCH = Law(
    "0.58 · D^0.571",
    "tokens",
    "step law, arXiv 2503.04715",
    "N (without embeddings) 6e7 to 1.1e9, D 2e9 to 1e11, sequences of 2,048",
    {"N": (6e7, 1.1e9), "D": (2e9, 1e11)},
)
POWER_LR = Law(
    "4.6 · β · D^−0.51, at most 0.02; β: batch in sequences of 4,096 tokens",
    "learning rate of WSD's stable phase (under muP)",
    "power scheduler, arXiv 2408.13359",
    "D 2e9 to 2.56e11, β 16 to 512, N 1.2e7 to 1.21e8",
    {"N": (1.2e7, 1.21e8), "D": (2e9, 2.56e11), "β": (16, 512)},
)
MINICPM_BATCH = Law(
    "1.21e9 / L^6.24",
    "tokens",
    "MiniCPM, arXiv 2404.06395",
    "N 9e6 to 1.7e8, loss on C4 with MiniCPM's tokenizer",
)
CRITICAL_BATCH = Law(
    "2.1e8 / L^(1/0.21)",
    "tokens",
    "Kaplan et al., arXiv 2001.08361",
    "L 2.3 to 6, WebText2 with GPT-2's tokenizer",
    {"L": (2.3, 6.0)},
)
CHINCHILLA_LOSS = Law(
    "1.69 + 406.4 / N^0.34 + 410.7 / D^0.28",
    "nats per token",
    "Hoffmann et al., arXiv 2203.15556, approach 3",
    "N 7e7 to 1.6e10, D 5e9 to 5e11, MassiveText",
    {"N": (7e7, 1.6e10), "D": (5e9, 5e11)},
)


LOSS_AT_BATCH = Law(
    "(1.5e14 / N)^0.076 + (2.6e3 / S_min)^0.67, S_min = S / (1 + B_crit / B), B_crit = 1.7e8 / L^(1/0.205)",
    "nats per token",
    "“Unraveling the Mystery of Scaling Laws: Part I”, arXiv 2403.06563",
    "C4; constants from memory, not held against the paper: fit your own",
)


def step_law_lr(parameters: float, tokens: float) -> float:
    """Compute the peak learning rate. parameters: N without embedding and head; tokens: D of the whole run."""
    return 1.79 * parameters**-0.713 * tokens**0.307


def step_law_batch(tokens: float) -> float:
    """Compute the global batch in tokens (not sequences) for a run of D tokens."""
    return 0.58 * tokens**0.571


POWER_PEAK = 0.02


def power_law_lr(batch_tokens: float, tokens: float) -> float:
    """Compute the learning rate of WSD's stable phase for a global batch of `batch_tokens` and a run of `tokens`.

    4.6 is the paper's fit. Its power schedule, where `tokens` are those trained so far, takes 4 (`schedule.a`).
    """
    return min(POWER_PEAK, 4.6 * batch_tokens / REFERENCE_LENGTH * tokens**-0.51)


def minicpm_batch(loss: float) -> float:
    """Compute the global batch in tokens that reaches a C4 loss with the fewest tokens."""
    return 1.21e9 / loss**6.24


def critical_batch(loss: float, scale: float = KAPLAN_TOKENS, alpha: float = KAPLAN_ALPHA) -> float:
    """Compute B_crit(L) = B_* / L^(1/α_B) in tokens, where a loss takes twice the fewest steps and the fewest tokens."""
    return scale / loss ** (1 / alpha)


def chinchilla_loss(parameters: float, tokens: float) -> float:
    """Compute L(N, D), with N counting every parameter."""
    return 1.69 + 406.4 * parameters**-0.34 + 410.7 * tokens**-0.28


@dataclass(frozen=True)
class LossLaw:
    """The law L(N, S, B) of Kaplan et al. and of "Unraveling the Mystery of Scaling Laws: Part I" (arXiv 2403.06563).

    L = (N_c / N)^α_N + (S_c / S_min)^α_S,  S_min = S / (1 + B_crit(L) / B),  B_crit(L) = B_* / L^(1/α_B)

    N without embeddings, S in steps, B in tokens. The default constants are recalled from that paper for C4 and depend on
    tokenizer, data and context: fit your own before trusting a digit.
    """

    n_scale: float = 1.5e14
    n_power: float = 0.076
    s_scale: float = 2.6e3
    s_power: float = 0.67
    b_scale: float = 1.7e8
    b_power: float = 0.205

    def at_infinite_steps(self, parameters: float) -> float:
        """Compute the loss's limit (N_c / N)^α_N."""
        return (self.n_scale / parameters) ** self.n_power

    def loss(self, parameters: float, steps: float, batch_tokens: float) -> float:
        """Compute the loss after so many steps at a constant batch: the L that solves the equation above."""
        floor = self.at_infinite_steps(parameters)

        def excess(loss: float) -> float:
            """Return the equation's right-hand side less L, which falls as L rises."""
            steps_min = steps / (1 + critical_batch(loss, self.b_scale, self.b_power) / batch_tokens)
            return floor + (self.s_scale / steps_min) ** self.s_power - loss

        low, high = floor, floor + 1.0
        while excess(high) > 0:
            high *= 2
        while high - low > 1e-12 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class MuP:
    """The multipliers of muP as the power scheduler's paper uses it (arXiv 2408.13359 table 1).

    width     m_width = dim / base: rates of matrices inside the blocks are divided by it, their initial std by its root
    embedding m_emb, on the embedding's output; residual: m_res, on each residual branch
    """

    width: float
    embedding: float = 12.0
    residual: float = 0.22

    @classmethod
    def of(cls, dim: int, base: int = 256) -> MuP:
        """Return the multipliers of a model of this width whose hyper-parameters were tuned at `base`."""
        return cls(dim / base)


LR_LAWS = ("step_law", "power")
BATCH_LAWS = ("step_law",)


def automatic_lr(law: str, parameters: float, tokens: float, batch_tokens: float) -> float:
    """Compute `optim.lr=auto:<law>`. Raises ValueError naming the laws there are."""
    if law == "step_law":
        return step_law_lr(parameters, tokens)
    if law == "power":
        return power_law_lr(batch_tokens, tokens)
    raise ValueError(f"there is no law 'auto:{law}' for a learning rate; write one of {_written(LR_LAWS)}")


def automatic_batch(law: str, tokens: float, seq_len: int, multiple: int) -> int:
    """Compute `batch.samples=auto:<law>` in sequences, to the nearest multiple. Raises ValueError naming the laws there are."""
    if law == "step_law":
        return max(1, round(step_law_batch(tokens) / seq_len / multiple)) * multiple
    raise ValueError(f"there is no law 'auto:{law}' for a batch; write one of {_written(BATCH_LAWS)}")


def _written(laws: tuple[str, ...]) -> str:
    return ", ".join(f"auto:{law}" for law in laws)
