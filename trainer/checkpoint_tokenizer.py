"""Find the tokenizer of a checkpoint's model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.problems import ConfigError, Problem
from ..data.tokenizing.tokenizer import Tokenizer
from .find_checkpoint import tokenizer_beside
from .run import prepared_data
from .saved_classes import refuse_unnamed_classes
from .typed import typed_node


def checkpoint_tokenizer(checkpoint: Path | str, config: Mapping[str, Any], state: Mapping[str, Any]) -> Tokenizer:
    """Load the tokenizer beside the checkpoints; if there is none, build that of the data again.

    config: the checkpoint's; state: of its manifest. Raises ConfigError where there is none.
    """
    beside = "put the model's tokenizer.json beside the checkpoint"
    if (file := tokenizer_beside(checkpoint)) is not None:
        # Only the data know it where they are shards; checkpoints before that say what the config said.
        end = state.get("end_of_document", config.get("data", {}).get("end_of_document"))
        try:
            return Tokenizer.load(file, end)
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
