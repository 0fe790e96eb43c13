"""`meshloom generate`: continue a prompt with the model of a checkpoint, on one process, whatever layout saved it."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.problems import ConfigError, Problem
from .arguments import describe, parse

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer


@dataclass
class GenerateArguments:
    """The arguments of `meshloom generate`.

    checkpoint   a step-… folder, a folder of them (the newest complete one is taken), or hf:<folder>, a model of Hugging Face's
    tokens       most tokens to add; the text ends earlier where the model ends the document
    temperature  0 always takes the likeliest token
    top_k        draw among so many of the likeliest tokens; null: among all
    model        the class of your own that the model is of, where it is none of Meshloom's
    context      tokens the model looks back at; null: the length it was trained with, which an imported model does not say
    """

    checkpoint: str
    prompt: str = ""
    tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50
    seed: int = 1
    model: str | None = None
    context: int | None = None

    def problems(self) -> list[Problem]:
        """Return the problems of the values."""
        found: list[Problem] = []
        if self.tokens < 1:
            found.append(Problem("tokens", f"{self.tokens} adds nothing", "use 1 or more"))
        if not self.temperature >= 0:  # nan, too
            found.append(Problem("temperature", f"{self.temperature} is no temperature", "use 0 for the likeliest token"))
        if not 0 <= self.seed < 2**63:
            found.append(Problem("seed", f"{self.seed} is no seed", "use 0 up to less than 2^63"))
        if self.top_k is not None and self.top_k < 1:
            found.append(Problem("top_k", f"{self.top_k} leaves no token", "use 1 or more, or null for all"))
        if self.context is not None and self.context < 1:
            found.append(Problem("context", f"{self.context} looks at nothing", "use 1 or more"))
        return found


def main(argv: Sequence[str]) -> int:
    """Print the prompt with its continuation. Return 0, 2 for bad arguments, 1 for a checkpoint or data that can't be read."""
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
            print(continue_prompt(arguments))
        except CheckpointError as error:
            print(f"meshloom generate: {error}", file=sys.stderr)
            return 1
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def continue_prompt(arguments: GenerateArguments) -> str:
    """Return the prompt and its continuation.

    Raises ConfigError for a missing checkpoint or tokenizer, and CheckpointError for a damaged checkpoint.
    """
    import torch

    from ..checkpoint.restore import read_manifest
    from ..config.structured import literal
    from ..parallel.mesh import pick_device
    from ..trainer.build import build_model
    from ..trainer.checkpoint_fit import misstated_size, weight_shapes
    from ..trainer.find_checkpoint import find_checkpoint
    from ..trainer.hooks.sampling import generate, load_whole_model
    from ..trainer.resumed_config import saved_config
    from ..trainer.typed import typed_node

    checkpoint = find_checkpoint(arguments.checkpoint, "checkpoint")
    manifest = read_manifest(checkpoint)
    state = manifest.state
    config: dict[str, Any] = literal(saved_config(state))
    if "model" not in config:
        message = f"'{checkpoint}' was imported from files that don't say what model their weights belong to"
        raise ConfigError([Problem("checkpoint", message, "train from it (resume=…), and take the run's checkpoint")])
    _refuse_unnamed_model(config, arguments.model)
    if (message := misstated_size(config, weight_shapes(manifest))) is not None:
        raise ConfigError([Problem("checkpoint", message, "take another: this one is damaged")])
    context = arguments.context or (config["data"]["seq_len"] if "data" in config else None)
    if context is None:
        fix = "give the length that it was trained with as context=…"
        raise ConfigError(
            [Problem("context", f"'{checkpoint}' was imported and does not say how far its model looks back", fix)]
        )
    tokenizer = _tokenizer(checkpoint, config, state)
    vocabulary = state.get("vocabulary") or config["model"]["vocabulary"]
    return generate(
        load_whole_model(
            build_model(typed_node("model", config["model"]), vocabulary), checkpoint, pick_device(), torch.float32
        ),
        tokenizer,
        arguments.prompt,
        tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        context=context,
    )


def _refuse_unnamed_model(config: Mapping[str, Any], model: str | None) -> None:
    """Raise ConfigError if the checkpoint's model is of a class that is neither Meshloom's nor named by the arguments."""
    from ..trainer.saved_classes import may_be_a_users, unnamed_nodes

    for path, node in unnamed_nodes({"model": config["model"]}, {"model": {"_target_": model}}):
        found = f"the checkpoint names the class {node['_target_']!r}, which today's command line and recipe don't"
        typed = shlex.quote(f"model={node['_target_']}")
        own = path == ("model",) and may_be_a_users(node["_target_"])
        fix = f"if it is yours, type {typed}" if own else "don't trust it"
        raise ConfigError([Problem("model", found, fix)])


def _tokenizer(checkpoint: Path | str, config: Mapping[str, Any], state: Mapping[str, Any]) -> Tokenizer:
    """Load the tokenizer beside the checkpoints; if there is none, build that of the data again."""
    from ..checkpoint.files import hugging_face_folder
    from ..data.tokenizer import Tokenizer
    from ..trainer.run import prepared_data
    from ..trainer.saved_classes import refuse_unnamed_classes
    from ..trainer.typed import typed_node

    beside = "put the model's tokenizer.json beside the checkpoint"
    foreign = hugging_face_folder(checkpoint)
    if foreign is not None or isinstance(checkpoint, Path):
        step = Path(checkpoint)
        for folder in (step, step.parent, step.parent.parent) if foreign is None else (foreign,):
            if (folder / "tokenizer.json").is_file():
                # Only the data know it where they are shards; checkpoints before that say what the config said.
                end = state.get("end_of_document", config.get("data", {}).get("end_of_document"))
                try:
                    return Tokenizer.load(folder / "tokenizer.json", end)
                except (ValueError, OSError) as error:
                    raise ConfigError([Problem("checkpoint", str(error), beside)]) from error
    if "data" not in config:
        raise ConfigError([Problem("checkpoint", f"'{checkpoint}' was imported without a tokenizer", beside)])
    try:
        refuse_unnamed_classes({"data": config["data"]}, {})
        data = prepared_data(typed_node("data", config["data"]), config.get("seed", 1), config["model"].get("vocabulary"))
    except ConfigError as error:  # the run's data is not on this machine, or elsewhere
        message = f"there is no tokenizer.json beside '{checkpoint}', and its data can't be read"
        raise ConfigError([Problem("checkpoint", message, beside), *error.problems]) from error
    if data.tokenizer is None:
        message = f"'{checkpoint}' was trained on data={config['data']['name']}, which has no text"
        raise ConfigError([Problem("checkpoint", message, "take a checkpoint of a run on text")])
    if data.fingerprint != state.get("data_fingerprint", ""):
        message = f"the data={config['data']['name']} of this machine is not what '{checkpoint}' was trained on"
        raise ConfigError([Problem("checkpoint", message, beside)])
    return data.tokenizer
