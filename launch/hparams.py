"""`meshloom hparams`: what the laws of scale recommend for a model and a number of tokens, and how far to trust it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config.compose import Composer
from ..config.duration import Duration, Unit
from ..config.problems import ConfigError, Problem
from ..optim import laws
from ..optim.laws import Law, LossLaw, MuP
from .arguments import describe, parse


@dataclass
class Arguments:
    """The keys of the command line."""

    model: str
    tokens: str
    seq_len: int = 4096
    batch: int | None = None
    loss: float | None = None
    multiple: int = 8
    mup_base: int = 256
    config_dir: str | None = None


NOTES = """
  model     a model of the recipes, as in model=llama_1b
  tokens    length of the run: 100B, 1.5e12
  batch     global batch in sequences; null: what the step law gives
  loss      the loss to be reached, in nats per token; null: what Chinchilla's law predicts
  multiple  batches are rounded to multiples of this (batch.micro × data-parallel size)
  mup_base  width at which muP's hyper-parameters were tuned"""


@dataclass(frozen=True)
class Row:
    """One recommendation. arguments: what the law was asked with, by the names of its fitted ranges."""

    what: str
    value: str
    law: Law
    arguments: dict[str, float]

    @property
    def extrapolated(self) -> str:
        """The arguments outside of what the law was fitted on, in words."""
        return ", ".join(f"{name} = {_count(self.arguments[name])}" for name in self.law.extrapolated(**self.arguments))


@dataclass(frozen=True)
class Recommendation:
    """Everything that is printed: the run's sizes, the laws' values, muP's multipliers, and overrides to paste."""

    parameters: int
    hidden: int
    tokens: float
    rows: list[Row]
    mup: MuP
    step_overrides: list[str]
    power_overrides: list[str]


def main(argv: Sequence[str]) -> int:
    """Print the recommendations. Returns 0, or 2 for arguments that can't be read."""
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: meshloom hparams model=llama_1b tokens=100B [key=value …]\n\nkeys:\n{describe(Arguments)}\n{NOTES}")
        return 0
    try:
        arguments = parse(Arguments, argv)
        found = recommend(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    show(found, arguments, Console(soft_wrap=True))
    return 0


def recommend(arguments: Arguments) -> Recommendation:
    """Ask every law. Raises ConfigError for a model or a length that there isn't."""
    problems: list[Problem] = []
    tokens = _tokens(arguments.tokens, problems)
    for key in ("seq_len", "multiple", "mup_base"):
        if getattr(arguments, key) < 1:
            problems.append(Problem(key, f"{getattr(arguments, key)} is not positive", "use 1 or more"))
    composition = Composer(arguments.config_dir).compose([f"model={arguments.model}"])
    problems += composition.problems
    if problems:
        raise ConfigError(problems)
    from ..trainer.automatic import hidden_parameters
    from ..trainer.build import build_model

    config = composition.config
    hidden = hidden_parameters(config)
    total = build_model(config, vocabulary=config.model.vocabulary or 1).parameter_count()
    seq_len, multiple = arguments.seq_len, arguments.multiple
    loss = arguments.loss or laws.chinchilla_loss(total, tokens)
    step_batch = laws.automatic_batch("step_law", tokens, seq_len, multiple)
    batch = arguments.batch or step_batch
    step_lr = laws.step_law_lr(hidden, tokens)
    power_lr = laws.power_law_lr(batch * seq_len, tokens)
    batch_law, critical = laws.step_law_batch(tokens), laws.critical_batch(loss)
    at_batch = LossLaw().loss(hidden, tokens / (batch * seq_len), batch * seq_len)
    step = {"N": float(hidden), "D": tokens}
    power = {"N": float(hidden), "D": tokens, "β": batch * seq_len / laws.REFERENCE_LENGTH}
    rows = [
        Row("learning rate", f"{step_lr:.3e}", laws.STEP_LR, step),
        Row("batch", f"{_count(batch_law)} tokens\n{step_batch} sequences", laws.STEP_BATCH, step),
        Row(f"learning rate\nat batch {batch}", f"{power_lr:.3e}", laws.POWER_LR, power),
        Row("loss", f"{laws.chinchilla_loss(total, tokens):.3f}", laws.CHINCHILLA_LOSS, {"N": float(total), "D": tokens}),
        Row(f"loss\nat batch {batch}", f"{at_batch:.3f}", laws.LOSS_AT_BATCH, {}),
        Row(f"batch\nat loss {loss:.3f}", _batch(laws.minicpm_batch(loss), seq_len), laws.MINICPM_BATCH, {}),
        Row(f"critical batch\nat loss {loss:.3f}", _batch(critical, seq_len), laws.CRITICAL_BATCH, {"L": loss}),
    ]
    length = ["trainer.steps=null", f"trainer.tokens={int(tokens)}", f"data.seq_len={seq_len}"]
    mup = MuP.of(config.model.dim, arguments.mup_base)
    return Recommendation(
        parameters=total,
        hidden=hidden,
        tokens=tokens,
        rows=rows,
        mup=mup,
        step_overrides=[
            f"optim.lr={step_lr:.3e}",
            f"batch.samples={step_batch}",
            "schedule=cosine",
            f"schedule.final={1e-5 / step_lr:.2g}",
            *length,
        ],
        power_overrides=[
            "schedule=power",
            f"optim.lr={laws.POWER_PEAK}",
            f"batch.samples={batch}",
            f"model.mup_base={arguments.mup_base}",
            f"model.mup_embedding={mup.embedding:g}",
            f"model.mup_residual={mup.residual:g}",
            "model.init_std=0.1",
            *length,
        ],
    )


def show(found: Recommendation, arguments: Arguments, console: Console) -> None:
    """Print it."""
    console.print(
        f"{arguments.model}: {_count(found.parameters)} parameters, {_count(found.hidden)} of them neither embedding nor head; "
        f"{_count(found.tokens)} tokens\n"
    )
    table = Table(show_lines=True)
    table.add_column("recommended")
    table.add_column("value", style="bold")
    table.add_column("where it comes from")
    for row in found.rows:
        origin = Text(f"{row.law.formula}\n{row.law.unit}\n{row.law.source}\nfitted on {row.law.fitted}")
        if row.extrapolated:
            origin.append(f"\nextrapolated: here {row.extrapolated}", style="yellow")
        table.add_row(row.what, row.value, origin)
    table.add_row(
        "muP multipliers",
        f"m_width {found.mup.width:g}\nm_emb {found.mup.embedding:g}\nm_res {found.mup.residual:g}",
        f"m_width = dim / {arguments.mup_base}: learning rates of block matrices ÷ m_width, their initial std ÷ √m_width\n"
        "power scheduler, arXiv 2408.13359, table 1\nused for PowerLM-3B (m_width 9) and PowerMoE-3B (6)",
    )
    console.print(table)
    for name, overrides in (("the step law", found.step_overrides), ("the power schedule", found.power_overrides)):
        console.print(f"\nOverrides for {name}, to paste behind `meshloom train model={arguments.model}`:")
        console.print(" ".join(overrides), style="green", highlight=False)


def _tokens(written: str, problems: list[Problem]) -> float:
    try:
        length = Duration.parse(
            written if any(word in written.lower() for word in ("tok", "step", "%")) else f"{written} tokens"
        )
        if length.unit is Unit.TOKENS and length.value >= 1:
            return length.value
    except ValueError:
        pass
    problems.append(Problem("tokens", f"'{written}' is not a number of tokens", "write 100B or 1.5e12"))
    return 1.0


def _batch(tokens: float, seq_len: int) -> str:
    return f"{_count(tokens)} tokens\n{tokens / seq_len:.0f} sequences"


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {letter}"
    return f"{number:.4g}"
