"""`meshloom generate`: continue prompts with the model of a checkpoint, on one process, whatever layout saved it."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..config.problems import ConfigError, Problem
from ..config.progress_bar import progress
from .arguments import describe, parse
from .exit_codes import BAD_CONFIG

if TYPE_CHECKING:
    from torch import nn

    from ..data.documents.chat import ChatTemplate
    from ..data.tokenizing.tokenizer import Tokenizer
    from ..trainer.generation import Text


@dataclass(frozen=True)
class GenerateArguments:
    """The arguments of `meshloom generate`.

    checkpoint   a step-… folder, a folder of them (the newest complete one is taken), or hf:<folder>, a model of Hugging Face's
    prompt       text to continue; given several times: as many prompts
    prompts      a file of prompts: one a line, or in a .jsonl an object a line with a text as prompt or, of a chat, messages
    tokens       most tokens to add; the text ends earlier where the model ends the document
    temperature  0 always takes the likeliest token
    top_k        draw among so many of the likeliest tokens; null: among all
    top_p        draw among the fewest tokens whose probabilities add up to it; 1: among all
    min_p        draw among tokens at least so likely as this share of the likeliest; 0: among all
    stop         end a text before this string; given several times: before the first of any
    samples      texts for each prompt
    batch        texts computed at once
    seed         what tokens are drawn from: a text depends on it and on the text's number alone
    chat         each prompt is what a user says, put into the chat template of the model's tokenizer
    interactive  read prompts from the terminal, one a line, until end of file; with chat=true, one conversation
    output       a file to write a JSON object a line to, instead of printing
    model        the class of your own that the model is of, where it is none of Meshloom's
    context      tokens the model looks back at; null: the length it was trained with, which an imported model does not say
    """

    checkpoint: str
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    samples: int = 1
    batch: int = 16
    seed: int = 1
    chat: bool = False
    interactive: bool = False
    output: str | None = None
    model: str | None = None
    context: int | None = None

    def problems(self) -> list[Problem]:
        """Return the problems of the values."""
        found: list[Problem] = []
        for name in ("tokens", "samples", "batch"):
            if vars(self)[name] < 1:
                found.append(Problem(name, f"{vars(self)[name]} adds nothing", "use 1 or more"))
        if not self.temperature >= 0:  # nan, too
            found.append(Problem("temperature", f"{self.temperature} is no temperature", "use 0 for the likeliest token"))
        if not 0 <= self.seed < 2**63:
            found.append(Problem("seed", f"{self.seed} is no seed", "use 0 up to less than 2^63"))
        if self.top_k is not None and self.top_k < 1:
            found.append(Problem("top_k", f"{self.top_k} leaves no token", "use 1 or more, or null for all"))
        if not 0 < self.top_p <= 1:
            found.append(Problem("top_p", f"{self.top_p} is no probability", "use more than 0, up to 1 for all tokens"))
        if not 0 <= self.min_p <= 1:
            found.append(Problem("min_p", f"{self.min_p} is no share", "use 0 for all tokens, up to 1"))
        if self.context is not None and self.context < 1:
            found.append(Problem("context", f"{self.context} looks at nothing", "use 1 or more"))
        if "" in self.stop:
            found.append(Problem("stop", "an empty string stops every text", "leave it out"))
        if self.interactive and (self.prompt or self.prompts or self.output or self.samples > 1):
            text = "prompts come from the terminal, one at a time, and go there"
            found.append(Problem("interactive", text, "leave prompt, prompts, output and samples out"))
        return found


@dataclass(frozen=True)
class Prompt:
    """A prompt: its text as typed, or of a chat the messages so far; and its token ids."""

    text: str
    tokens: list[int]


@dataclass
class Speaker:
    """A loaded model with its tokenizer, and how it is asked to go on.

    template  of a chat; None: prompts are continued as they are
    ends      token ids that end a text, besides the end of a document
    """

    model: nn.Module
    tokenizer: Tokenizer
    context: int
    arguments: GenerateArguments
    template: ChatTemplate | None = None
    ends: list[int] = field(default_factory=list[int])

    def encode(self, text: str, messages: list[dict[str, str]] | None = None) -> Prompt:
        """Encode a prompt. messages: of a chat; None: the text is all that was said. Raises ConfigError."""
        if self.template is None:
            return Prompt(text, self.tokenizer.encode(text))
        try:
            said = self.template.prompt(messages or [{"role": "user", "content": text}])
        except ValueError as error:
            raise ConfigError([Problem("chat", str(error))]) from error
        return Prompt(text, self.tokenizer.encode(said, specials=True))

    def answer(self, prompts: Sequence[Prompt], samples: int) -> Iterator[Text]:
        """Yield the texts of each prompt, in order: `samples` of the first, then of the next."""
        from ..trainer.generation import Sampling, generate_texts

        asked, wanted = self.arguments, [prompt.tokens for prompt in prompts for _ in range(samples)]
        for first in range(0, len(wanted), asked.batch):
            yield from generate_texts(
                self.model,
                self.tokenizer,
                wanted[first : first + asked.batch],
                Sampling(asked.temperature, asked.top_k, asked.top_p, asked.min_p),
                tokens=asked.tokens,
                seed=asked.seed,
                context=self.context,
                stop=asked.stop,
                ends=self.ends,
                first=first,
                on_uncached=_say_slow if first == 0 else lambda _: None,
            )


def _say_slow(why: str) -> None:
    print(f"meshloom generate: every token is computed from its whole context, because {why}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """Print prompts with their continuations. Return 0, 2 for bad arguments, 1 for a checkpoint or data that can't be read."""
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: meshloom generate checkpoint=<folder> [key=value …]\n\n{describe(GenerateArguments)}\n")
        print(inspect.getdoc(GenerateArguments))
        return 0
    try:
        arguments = parse(GenerateArguments, argv)
        problems = arguments.problems()
        if problems:
            raise ConfigError(problems)
        from ..checkpoint.errors import CheckpointError

        try:
            if arguments.interactive:
                _converse(load_speaker(arguments))
            else:
                _continue(arguments)
        except (CheckpointError, OSError) as error:
            print(f"meshloom generate: {error}", file=sys.stderr)
            return 1
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    return 0


def _continue(arguments: GenerateArguments) -> None:
    """Continue all prompts, and print the texts or write them to the file."""
    asked = _read_prompts(arguments)
    speaker = load_speaker(arguments)
    prompts = [speaker.encode(text, messages) for text, messages in asked]
    found = speaker.answer(prompts, arguments.samples)
    numbered = [(prompt, sample) for prompt in prompts for sample in range(1, arguments.samples + 1)]
    if arguments.output is not None:
        with Path(arguments.output).open("w", encoding="utf-8") as file, progress("generating") as advance:
            for number, ((prompt, sample), text) in enumerate(zip(numbered, found, strict=True), 1):
                count = len(text.tokens) - text.start
                line = {"prompt": prompt.text, "sample": sample, "text": text.text, "tokens": count, "ended": text.ended}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                advance(number, len(numbered))
        return
    for at, ((prompt, sample), text) in enumerate(zip(numbered, found, strict=True)):
        if len(numbered) > 1:
            print(f"{chr(10) if at else ''}--- prompt {at // arguments.samples + 1}, sample {sample}")
        print(text.text if arguments.chat else prompt.text + text.text)


def _converse(speaker: Speaker) -> None:
    """Read prompts from the terminal and answer each; of a chat, with all that was said before."""
    said: list[dict[str, str]] = []
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(shown)
        except EOFError:
            return
        if speaker.template is None:
            (text,) = speaker.answer([speaker.encode(line)], 1)
            print(line + text.text, flush=True)
        else:
            said.append({"role": "user", "content": line})
            (text,) = speaker.answer([speaker.encode(line, said)], 1)
            said.append({"role": "assistant", "content": text.text})
            print(text.text, flush=True)
        # Each text has random numbers of its own.
        speaker.arguments = replace(speaker.arguments, seed=(speaker.arguments.seed + 1) % 2**63)


def _read_prompts(arguments: GenerateArguments) -> list[tuple[str, list[dict[str, str]] | None]]:
    """Return the prompts of the command line and of the file: the text, and the messages of one that has some."""
    found: list[tuple[str, list[dict[str, str]] | None]] = [(text, None) for text in arguments.prompt]
    if arguments.prompts is None:
        return found or [("", None)]
    path = Path(arguments.prompts)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("prompts", f"'{path}' can't be read: {error}", "give a text file")]) from error
    for number, line in enumerate(lines, 1):
        if path.suffix != ".jsonl":
            found.append((line, None))
            continue
        try:
            found.append(_read_object(json.loads(line), chat=arguments.chat))
        except (ValueError, KeyError, TypeError) as error:
            fix = 'write {"prompt": "…"}, or of a chat {"messages": [{"role": "user", "content": "…"}]}'
            raise ConfigError([Problem("prompts", f"line {number} of '{path}' is no prompt ({error})", fix)]) from error
    if not found:
        raise ConfigError([Problem("prompts", f"'{path}' is empty", "give a prompt on each line")])
    return found


def _read_object(written: Any, *, chat: bool) -> tuple[str, list[dict[str, str]] | None]:
    if not isinstance(written, dict):
        raise TypeError("no object")
    given = cast(dict[str, Any], written)
    if "messages" not in given:
        return str(given["prompt"]), None
    if not chat:
        raise ValueError("messages need chat=true")
    return json.dumps(given["messages"], ensure_ascii=False), given["messages"]


def load_speaker(arguments: GenerateArguments) -> Speaker:
    """Load the model and its tokenizer.

    Raises ConfigError for a missing checkpoint or tokenizer, and CheckpointError for a damaged checkpoint.
    """
    import torch

    from ..parallel.mesh import pick_device
    from .load import OpenedCheckpoint

    opened = OpenedCheckpoint.find(arguments.checkpoint, arguments.model)
    context = arguments.context or opened.context
    if context is None:
        fix = "give the length that it was trained with as context=…"
        message = f"'{opened.path}' was imported and does not say how far its model looks back"
        raise ConfigError([Problem("context", message, fix)])
    tokenizer = opened.tokenizer()
    template, ends = _template(opened.path, tokenizer) if arguments.chat else (None, [])
    whole = opened.whole_model(pick_device(), torch.float32)
    return Speaker(whole, tokenizer, context, arguments, template, ends)


def _template(checkpoint: Path | str, tokenizer: Tokenizer) -> tuple[ChatTemplate, list[int]]:
    """Return the chat template beside a checkpoint's tokenizer, and the tokens that end what the assistant says."""
    from ..data.documents.chat import ChatTemplate
    from ..trainer.find_checkpoint import tokenizer_beside

    file = tokenizer_beside(checkpoint)
    template = ChatTemplate.find(None, "" if file is None else str(file))
    if not template.text:
        where = f"beside '{file}'" if file is not None else f"'{checkpoint}' has no tokenizer.json, and so"
        fix = "put the model's tokenizer_config.json or chat_template.jinja there"
        raise ConfigError([Problem("chat", f"{where} lies no chat template", fix)])
    end = tokenizer.token_id(template.names.get("eos_token", ""))
    return template, [] if end is None else [end]
