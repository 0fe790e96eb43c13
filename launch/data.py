"""`meshloom data`: make token shards and verify them (`tokenize`, `verify`); look at a run's data (`show`, `stats`)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.problems import ConfigError, Problem
from ..config.words import counted
from .arguments import describe, parse
from .exit_codes import BAD_CONFIG

_LOOKED_AT = 256  # files whose contents tell the kind of all


@dataclass
class TokenizeArguments:
    """Turn documents into token shards: `output/train` and `output/validation`, for data=shards data.path=<output>.

    input             a path, glob pattern or folder; hf: a data set's name; stdlib: leave it out
    output            the folder to write; it must not exist
    kind              text, jsonl, parquet, hf or stdlib; auto: by the contents and endings of the files
    field             the member or column with the text (jsonl, parquet, hf)
    separator         text between documents of a file (text); null: a file is a document
    subset, split, revision   of a Hugging Face data set
    tokenizer         bpe: trained on these documents; bytes; or the path of a tokenizer.json
    vocabulary        of a trained tokenizer
    tokenizer_sample  characters it is trained on, at most
    end_of_document   the token that ends a document in a tokenizer.json; null: the well-known names are tried
    validation        share of the tokens that is held out
    shard_tokens      a new file is begun after so many
    """

    output: str
    input: str | None = None
    kind: str = "auto"
    field: str = "text"
    separator: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    tokenizer: str = "bpe"
    vocabulary: int = 32_000
    tokenizer_sample: int = 100_000_000
    end_of_document: str | None = None
    validation: float = 0.01
    shard_tokens: int = 1 << 30


@dataclass
class VerifyArguments:
    """Read token shards once, compare every digest, and say what they hold.

    path  a shard folder, or one with `train/` and `validation/`
    """

    path: str


def tokenize(arguments: TokenizeArguments) -> Path:
    """Write the shards. Return the folder. Raises ConfigError for bad arguments, ValueError for unreadable documents.

    A vocabulary that the text does not fill is told on stderr.
    """
    from ..config.cache import build_once, cache_folder
    from ..data.corpus import TokenizerSettings
    from ..data.documents.records import HuggingFace, JsonLines, ParquetFiles
    from ..data.documents.sources import StandardLibrary, TextFiles
    from ..data.tokenizing.prepare import write_corpus

    given, field = arguments.input, arguments.field
    kind, problems = arguments.kind, list[Problem]()
    if kind == "auto":
        # JSON read as text would be trained on with its markup.
        kinds = _kinds_of(TextFiles(given).files()) or ["text"]
        kind = kinds[0]
        if len(kinds) > 1:
            fix = "give the kind that is meant, or a pattern for its files alone"
            problems.append(Problem("kind", f"'{given}' has files of {' and '.join(kinds)}", fix))
    sources = {
        "text": lambda: TextFiles(given, arguments.separator, markup=arguments.kind == "text"),
        "jsonl": lambda: JsonLines(given, field),
        "parquet": lambda: ParquetFiles(given, field),
        "hf": lambda: HuggingFace(given, arguments.subset, arguments.split, field, arguments.revision),
        "stdlib": StandardLibrary,
    }
    settings = TokenizerSettings(
        arguments.tokenizer, arguments.vocabulary, arguments.tokenizer_sample, arguments.end_of_document
    )
    # The problems' keys are those of a data node, data.<key>; here keys have no prefix.
    problems += [Problem(problem.key.removeprefix("."), problem.message, problem.fix) for problem in settings.problems("")]
    if kind not in sources:
        problems.append(Problem("kind", f"'{kind}' is unknown", f"use auto, {', '.join(sources)}"))
    else:
        found = sources[kind]().problems("")
        problems += [
            Problem(problem.key.removeprefix(".") or "kind", problem.message, _without_group(problem.fix)) for problem in found
        ]
    if not 0 <= arguments.validation < 1:
        problems.append(Problem("validation", f"{arguments.validation} is not a fraction", "use 0 up to less than 1"))
    if arguments.shard_tokens < 1:
        problems.append(Problem("shard_tokens", f"{arguments.shard_tokens} is no size", "use 1 or more"))
    output = Path(arguments.output).expanduser()
    if output.exists():
        problems.append(Problem("output", f"'{output}' exists already", "remove it, or write elsewhere"))
    if problems:
        raise ConfigError(problems)
    source = sources[kind]()
    source.key = ""
    tokenizer = settings.make([(source, arguments.validation)], cache_folder(None))
    build_once(
        output.absolute(),
        lambda folder: write_corpus(source, tokenizer, arguments.validation, folder, arguments.shard_tokens),
    )
    for notice in settings.shortage(tokenizer, "vocabulary"):
        print(notice, file=sys.stderr)
    return output


def _without_group(fix: str) -> str:
    """Word a fix that names keys of a data node for this command, whose keys have no group."""
    return fix.replace("data.markup=true", "kind=text").replace("data=", "kind=").replace("data.", "")


def _kinds_of(files: Sequence[Path]) -> list[str]:
    """Return the kinds of which there are files, told by their contents, and for records by their endings."""
    from ..data.documents import formats
    from ..data.documents.records import JsonLines, ParquetFiles

    found: set[str] = set()
    json_names = (*JsonLines.endings, *JsonLines.fallback_endings[0])
    for path in files[:: -(-len(files) // _LOOKED_AT)] if files else ():
        start, name = formats.head(path), path.name.lower()
        marked = formats.markup(start)
        if start.startswith(b"PAR1") or name.endswith(ParquetFiles.endings):
            found.add("parquet")
        elif (marked is not None and marked[0] == "JSON") or name.endswith(json_names):
            found.add("jsonl")
        elif start:
            found.add("text")
    return sorted(found)


def describe_shards(path: Path) -> list[str]:
    """Verify the shard folders at `path`. Return a line for each. Raises ShardError naming a damaged file."""
    from ..data.shards.manifest import MANIFEST
    from ..data.shards.reader import TokenShards

    folders = (
        [path]
        if (path / MANIFEST).is_file()
        else [folder for folder in (path / "train", path / "validation") if folder.exists()]
    )
    if not folders:
        raise ConfigError([Problem("path", f"'{path}' holds no token shards", "give the output of 'meshloom data tokenize'")])
    opened = [TokenShards(folder, verify=True) for folder in folders]
    return [
        f"{shards.folder}: {counted(shards.tokens, 'token')} in {counted(shards.documents, 'document')} and "
        f"{counted(len(shards.manifest.shards), 'file')}, "
        f"vocabulary {shards.vocabulary:,}, fingerprint {shards.fingerprint}"
        for shards in opened
    ]


def show(words: Sequence[str]) -> int:
    """Print samples of a run: `meshloom data show --help`."""
    from .data_show import main as show_samples

    return show_samples(words)


def stats(words: Sequence[str]) -> int:
    """Print what a run's data hold: `meshloom data stats --help`."""
    from .data_stats import main as tell

    return tell(words)


VIEWS = {"show": show, "stats": stats}
_COMMANDS: dict[str, type] = {"tokenize": TokenizeArguments, "verify": VerifyArguments}


def usage() -> str:
    """Return the text of `meshloom data --help`."""
    parts = [
        f"meshloom data {name} key=value …\n\n{describe(kind)}\n\n{inspect.getdoc(kind)}" for name, kind in _COMMANDS.items()
    ]
    return "\n\n\n".join([*parts, *(f"{view.__doc__}" for view in VIEWS.values())])


def main(argv: Sequence[str]) -> int:
    """Run a subcommand. Return 0, 2 for bad arguments, 1 for data that can't be read."""
    if argv and argv[0] in VIEWS:
        return VIEWS[argv[0]](argv[1:])
    if not argv or argv[0] not in _COMMANDS:
        print(usage(), file=sys.stdout if argv and argv[0] in ("-h", "--help") else sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    if any(word in ("-h", "--help") for word in argv):
        print(usage())
        return 0
    try:
        if argv[0] == "verify":
            lines = describe_shards(Path(parse(VerifyArguments, argv[1:]).path).expanduser())
        else:
            lines = describe_shards(tokenize(parse(TokenizeArguments, argv[1:])))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    except (ValueError, OSError) as error:
        print(f"meshloom data {argv[0]}: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0
