"""`meshloom hparams`: what scaling laws recommend for a model and a number of tokens, and how far to trust it."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config.compose import Composer
from ..config.duration import Unit, parse_count
from ..config.problems import ConfigError, Problem
from ..models.costs import parameter_count
from ..optim.scaling import laws
from ..optim.scaling.laws import Law, LossLaw, MuP
from ..trainer.schema import RunConfig, make_composer
from ..trainer.typed import typed_config
from .arguments import describe, parse
from .exit_codes import BAD_CONFIG


@dataclass
class HparamsArguments:
    """The keys of the command line."""

    tokens: str
    recipe: str | None = None
    model: str | None = None
    seq_len: int | None = None
    batch: int | None = None
    loss: float | None = None
    multiple: int | None = None
    mup_base: int = 256
    config_dir: str | None = None


NOTES = """
  tokens    length of the run: 100B, 1.5e12
  recipe    the recipe to start from, as in recipe=llama_1b; null: the one that is called like the model, or else quickstart
  model     another model than the recipe's, as in model=llama_1b
  seq_len   positions of a sequence; null: the recipe's
  batch     global batch in sequences; null: what the step law gives
  loss      the loss to be reached, in nats per token; null: what Chinchilla's law predicts
  multiple  batches are rounded to multiples of this; null: of 8 and the recipe's batch.micro, if that is a number
  mup_base  width at which muP's hyper-parameters were tuned

`--config-dir DIR`, a folder of further recipes as for `meshloom train`, is the same as config_dir=DIR."""


@dataclass(frozen=True)
class Row:
    """One recommendation. arguments: inputs of the law, by the names of its fitted ranges."""

    what: str
    value: str
    law: Law
    arguments: dict[str, float]

    @property
    def extrapolated(self) -> str:
        """The arguments outside the law's fitted ranges, in words."""
        return ", ".join(f"{name} = {_count(self.arguments[name])}" for name in self.law.extrapolated(**self.arguments))


@dataclass(frozen=True)
class Recommendation:
    """The whole output: the run's sizes, the laws' values, muP's multipliers, and overrides to paste.

    base     overrides that choose recipe and model
    setting  other values of the base, which the overrides don't change
    active   of the parameters, those that one token passes
    """

    base: list[str]
    setting: str
    parameters: int
    active: int
    hidden: int
    tokens: float
    rows: list[Row]
    mup: MuP
    step_overrides: list[str]
    power_overrides: list[str]


def main(argv: Sequence[str]) -> int:
    """Print the recommendations. Return 0, or 2 for arguments that can't be read."""
    if any(word in ("-h", "--help") for word in argv):
        print(
            "usage: meshloom hparams [--config-dir DIR] recipe=llama_1b tokens=100B [key=value …]\n\n"
            f"keys:\n{describe(HparamsArguments)}\n{NOTES}"
        )
        return 0
    parser = argparse.ArgumentParser(prog="meshloom hparams", add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir")
    switches, words = parser.parse_known_args(argv)
    if switches.config_dir is not None:
        words.append(f"config_dir={switches.config_dir}")
    try:
        arguments = parse(HparamsArguments, words)
        found = recommend(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    show(found, arguments, Console(soft_wrap=True))
    return 0


def recommend(arguments: HparamsArguments) -> Recommendation:
    """Evaluate every law. Raises ConfigError for an unknown recipe or model, or a missing length."""
    from ..trainer.automatic import hidden_parameters

    base, tokens, config = _read(arguments)
    shape = config.model.decoder()
    assert shape is not None, "of a config that was read"
    sized = replace(shape, vocabulary=shape.vocabulary or config.data.known_vocabulary or 1)
    hidden, total, micro = hidden_parameters(config), parameter_count(sized), config.batch.micro
    seq_len = arguments.seq_len or config.data.seq_len
    multiple = arguments.multiple or math.lcm(8, micro if isinstance(micro, int) else 1)
    step_batch = laws.automatic_batch("step_law", tokens, seq_len, multiple)
    batch, step_lr = arguments.batch or step_batch, laws.step_law_lr(hidden, tokens)
    loss = arguments.loss or laws.chinchilla_loss(total, tokens)
    mup = MuP.of(shape.dim, arguments.mup_base)
    length = ["trainer.steps=null", f"trainer.tokens={int(tokens)}", f"data.seq_len={seq_len}"]
    return Recommendation(
        base=base,
        setting=f"precision={config.precision} batch.micro={micro} data={config.data.name}",
        parameters=total,
        active=parameter_count(sized, active=True),
        hidden=hidden,
        tokens=tokens,
        rows=[
            *_step_rows(hidden, tokens, step_batch),
            *_rows_at_batch(hidden, tokens, seq_len, batch, chinchilla=total),
            *_rows_at_loss(loss, seq_len),
        ],
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


def _read(arguments: HparamsArguments) -> tuple[list[str], float, RunConfig]:
    """Return the words that choose recipe and model, the run's tokens, and the config. Raises ConfigError with all problems."""
    problems: list[Problem] = []
    tokens = _tokens(arguments.tokens, problems)
    for key in ("seq_len", "batch", "loss", "multiple", "mup_base"):
        value = getattr(arguments, key)
        if value is not None and not 0 < value < math.inf:
            problems.append(Problem(key, f"{value} is not positive", "use a number above 0"))
    composer = make_composer(arguments.config_dir)
    base = _base(arguments, composer)
    composition = composer.compose(base)
    config, untyped = typed_config(composition.config)
    unreadable = [*composition.problems, *untyped]
    problems += unreadable
    if not unreadable and config.model.decoder() is None:
        problems.append(Problem("model", "the laws are about Llama-like models", "name one that has model.dim"))
    if problems:
        raise ConfigError(problems)
    return base, tokens, config


def _step_rows(hidden: int, tokens: float, batch: int) -> Iterator[Row]:
    """Yield what the step law says. batch: its own, in whole sequences."""
    inputs = {"N": float(hidden), "D": tokens}
    yield Row("learning rate", f"{laws.step_law_lr(hidden, tokens):.3e}", laws.STEP_LR, inputs)
    yield Row("batch", f"{_count(laws.step_law_batch(tokens))} tokens\n{batch} sequences", laws.STEP_BATCH, inputs)


def _rows_at_batch(hidden: int, tokens: float, seq_len: int, batch: int, *, chinchilla: int) -> Iterator[Row]:
    """Yield the power scheduler's rate and the losses. chinchilla: parameters as Chinchilla's law counts them, all."""
    length = batch * seq_len
    inputs = {"N": float(hidden), "D": tokens, "β": length / laws.REFERENCE_LENGTH}
    yield Row(f"learning rate\nat batch {batch}", f"{laws.power_law_lr(length, tokens):.3e}", laws.POWER_LR, inputs)
    reached = laws.chinchilla_loss(chinchilla, tokens)
    yield Row("loss", f"{reached:.3f}", laws.CHINCHILLA_LOSS, {"N": float(chinchilla), "D": tokens})
    at_batch = LossLaw().loss(hidden, tokens / length, length)
    yield Row(f"loss\nat batch {batch}", f"{at_batch:.3f}", laws.LOSS_AT_BATCH, {})


def _rows_at_loss(loss: float, seq_len: int) -> Iterator[Row]:
    critical = laws.critical_batch(loss)
    yield Row(f"batch\nat loss {loss:.3f}", _batch(laws.minicpm_batch(loss), seq_len), laws.MINICPM_BATCH, {})
    yield Row(f"critical batch\nat loss {loss:.3f}", _batch(critical, seq_len), laws.CRITICAL_BATCH, {"L": loss})


def _base(arguments: HparamsArguments, composer: Composer) -> list[str]:
    """Return the choices of recipe and model that precede the overrides. Raises ConfigError if neither is given."""
    recipe, model = arguments.recipe, arguments.model
    if recipe is None and model is None:
        raise ConfigError([Problem("recipe", "is not given", "write recipe=llama_1b, or model=… as in `meshloom train`")])
    if recipe is None:
        recipe = model if model in composer.options("recipe") else "quickstart"
    return [f"recipe={recipe}", *([f"model={model}"] if model not in (None, recipe) else [])]


def show(found: Recommendation, arguments: HparamsArguments, console: Console) -> None:
    """Print the recommendation."""
    base = " ".join(found.base)
    passed = f" ({_count(found.active)} of them active)" if found.active < found.parameters else ""
    console.print(
        f"{base}: {_count(found.parameters)} parameters{passed}, {_count(found.hidden)} neither embedding nor head; "
        f"{_count(found.tokens)} tokens\n"
    )
    if passed:
        console.print("The laws were fitted on dense models: N is all parameters here, and a mixture is not one of these.\n")
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
    folder = "" if arguments.config_dir is None else f"{shlex.quote(f'--config-dir={arguments.config_dir}')} "
    for name, overrides in (("the step law", found.step_overrides), ("the power schedule", found.power_overrides)):
        console.print(f"\nFor {name}:")
        console.print(f"meshloom train {folder}{base} {' '.join(overrides)}", style="green", highlight=False, markup=False)
        for problem in _unfit([*found.base, *overrides], arguments.config_dir):
            console.print(f"· {problem}", style="yellow", highlight=False, markup=False)
    console.print(f"\nWhat {base} says besides: {found.setting}", highlight=False, markup=False)


def _unfit(overrides: Sequence[str], config_dir: str | None) -> list[Problem]:
    """Return the problems of the recommended run, such as a recipe's warm-up that is longer than a short run.

    Data and machine are not checked: the run may use others.
    """
    from ..trainer.resolve import ResolveOptions, resolve

    options = ResolveOptions(lambda _: 0, resumes=False, data_elsewhere=True)
    found = resolve(overrides, options, config_dir).problems
    return [problem for problem in found if problem.key.startswith(("schedule", "batch", "optim", "trainer", "model"))]


def _tokens(written: str, problems: list[Problem]) -> float:
    try:
        if (tokens := parse_count(written, Unit.TOKENS)) >= 1:
            return float(tokens)
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
