"""Sample text at the end of a run, from a whole model of its last checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ...checkpoint.folder import find_latest
from ..generation import Sampling, TextCodec, generate_texts
from ..loop import Loop
from ..whole_model import load_whole_model
from .base import Hook

log = logging.getLogger(__name__)


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
