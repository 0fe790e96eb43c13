"""Sample text at the end of a run, from a whole model of its last checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ...checkpoint.control import Control
from ...checkpoint.errors import CheckpointError
from ...checkpoint.folder import find_latest
from ...checkpoint.restore import restore
from ...models.protocol import Model
from ...parallel.box import Box
from ...parallel.fragment import Fragment
from ..generation import Sampling, TextCodec, generate_texts
from ..loop import Loop
from .base import Hook

log = logging.getLogger(__name__)


def load_whole_model(model: nn.Module, checkpoint: Path | str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Load a checkpoint's weights, saved on any layout, whole into a model on the meta device. Return it on `device`.

    Raises CheckpointError for a checkpoint that is damaged or lacks some of the weights.
    """
    names: dict[int, str] = {}
    ties: list[tuple[str, str]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names.setdefault(id(parameter), name) != name:
            ties.append((name, names[id(parameter)]))

    def give(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    model = model._apply(give).to(dtype)
    for name, source in ties:  # `_apply` gives every use of a tied weight its own storage
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))
    buffers = model.saved_buffers() if isinstance(model, Model) else {}
    fragments = [
        Fragment(name, "weight", tuple(parameter.shape), Box.whole(parameter.shape), parameter.detach())
        for name, parameter in [*model.named_parameters(), *buffers.items()]
    ]
    report = restore(checkpoint, fragments, Control.alone(), strict=False)  # the optimizer's state is not read
    if absent := sorted({*report.missing, *report.mismatched}):
        more = f" and {len(absent) - 4} more" if len(absent) > 4 else ""
        raise CheckpointError(f"{report.source} does not have this model's {', '.join(absent[:4])}{more}")
    return model.eval()


class SampleText(Hook):
    """Continues a prompt at the end of the run, and writes the text to sample.txt. Runs on one rank.

    It loads the weights from the run's last checkpoint, so it needs no other rank and works under any layout.

    build        makes the model on the meta device
    checkpoints  the folder of the run's checkpoints
    """

    alone = True

    def __init__(
        self, prompt: str, tokens: int, build: Callable[[], nn.Module], codec: TextCodec, seed: int, checkpoints: str
    ) -> None:
        self._prompt = prompt
        self._tokens = tokens
        self._checkpoints = checkpoints
        self._build = build
        self._codec = codec
        self._seed = seed

    def on_run_end(self, loop: Loop, output_dir: Path) -> None:
        """Generate the text, print it and write it."""
        checkpoint = find_latest(self._checkpoints)
        if checkpoint is None:  # a branch of a finished run takes no step, and saves nothing
            log.warning("trainer.sample_prompt: no sample, because '%s' holds no checkpoint", self._checkpoints)
            return
        model = load_whole_model(self._build(), checkpoint, loop.mesh.device, torch.float32)
        start, context = self._codec.encode(self._prompt), loop.horizon.seq_len
        (found,) = generate_texts(
            model, self._codec, [start], Sampling(), tokens=self._tokens, seed=self._seed, context=context
        )
        text = self._prompt + found.text
        (output_dir / "sample.txt").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n")
