"""Load a checkpoint's model and tokenizer in one process, whatever layout saved them."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config.problems import ConfigError, Problem

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.tokenizing.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A checkpoint's model, ready for use.

    model      its `forward(tokens_BS)` returns logits (B, S, V)
    tokenizer  `encode` and `decode` between text and token ids; None where the checkpoint has none
    config     of the run that saved it, as plain values; of an import, what is known of its model
    """

    model: nn.Module
    tokenizer: Tokenizer | None
    config: dict[str, Any]


def load(
    checkpoint: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    model: str | None = None,
) -> LoadedModel:
    """Load a checkpoint's weights whole into a model of this process, in evaluation mode.

    checkpoint  a step-… folder, a folder of them or a run's (the newest complete one is taken), or hf:<folder>
    device      default: a GPU, where there is one
    dtype       of the weights; default: float32
    model       the import path of the class of your own that the model is of, where it is none of Meshloom's

    Raises ConfigError where there is no checkpoint or its model is not known, and CheckpointError if it is damaged.
    """
    import torch

    from ..parallel.mesh import pick_device

    opened = OpenedCheckpoint.find(str(checkpoint), model)
    place = pick_device() if device is None else torch.device(device)
    whole = opened.whole_model(place, torch.float32 if dtype is None else dtype)
    try:
        tokenizer = opened.tokenizer()
    except ConfigError as error:
        log.warning("%s is loaded without a tokenizer: %s", opened.path, error.problems[0])
        tokenizer = None
    return LoadedModel(whole, tokenizer, opened.config)


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint that was found, and what it says of itself. Nothing but its manifest has been read.

    state  what the run saved besides arrays
    """

    path: Path | str
    config: dict[str, Any]
    state: Mapping[str, Any]

    @classmethod
    def find(cls, checkpoint: str, model: str | None = None) -> OpenedCheckpoint:
        """Find a checkpoint, and read what its model is. See `load`."""
        from ..checkpoint.restore import read_manifest
        from ..config.structured import literal
        from ..trainer.checkpoint_fit import misstated_size, weight_shapes
        from ..trainer.find_checkpoint import find_checkpoint
        from ..trainer.resumed_config import saved_config

        path = find_checkpoint(checkpoint, "checkpoint")
        manifest = read_manifest(path)
        config: dict[str, Any] = literal(saved_config(manifest.state))
        if "model" not in config:
            message = f"'{path}' was imported from files that don't say what model their weights belong to"
            raise ConfigError([Problem("checkpoint", message, "train from it (resume=…), and take the run's checkpoint")])
        _refuse_unnamed_model(config, model)
        if (message := misstated_size(config, weight_shapes(manifest))) is not None:
            raise ConfigError([Problem("checkpoint", message, "take another: this one is damaged")])
        return cls(path, config, manifest.state)

    @property
    def context(self) -> int | None:
        """The length of the sequences that it was trained on; None for an import, which does not say."""
        return self.config["data"]["seq_len"] if "data" in self.config else None

    def whole_model(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Build the model and load its weights. Raises CheckpointError for a damaged checkpoint."""
        from ..trainer.build import build_model
        from ..trainer.typed import typed_node
        from ..trainer.whole_model import load_whole_model

        vocabulary = self.state.get("vocabulary") or self.config["model"]["vocabulary"]
        model = build_model(typed_node("model", self.config["model"]), vocabulary)
        return load_whole_model(model, self.path, device, dtype)

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer beside the checkpoints; if there is none, build that of the data again.

        Raises ConfigError where neither can be, or the data are not text.
        """
        from ..trainer.checkpoint_tokenizer import checkpoint_tokenizer

        return checkpoint_tokenizer(self.path, self.config, self.state)


def _refuse_unnamed_model(config: Mapping[str, Any], model: str | None) -> None:
    """Raise ConfigError if the checkpoint's model is of a class that is neither Meshloom's nor named by the arguments."""
    from ..trainer.saved_classes import may_be_a_users, unnamed_nodes

    for path, node in unnamed_nodes({"model": config["model"]}, {"model": {"_target_": model}}):
        found = f"the checkpoint names the class {node['_target_']!r}, which today's command line and recipe don't"
        typed = shlex.quote(f"model={node['_target_']}")
        own = path == ("model",) and may_be_a_users(node["_target_"])
        fix = f"if it is yours, type {typed}" if own else "don't trust it"
        raise ConfigError([Problem("model", found, fix)])
