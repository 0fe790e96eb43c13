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

    It loads the weights from the run's last checkpoint, so it needs no other rank and works under any layout. They lie whole on
    this rank's device, beside the engine's. The run is over and saved by then, so whatever goes wrong is a warning.

    build        makes the model on the meta device
    checkpoints  the folder of the run's checkpoints
    dtype        in which it computes
    """

    alone = True

    def __init__(
        self,
        prompt: str,
        tokens: int,
        build: Callable[[], nn.Module],
        codec: TextCodec,
        seed: int,
        checkpoints: str,
        dtype: torch.dtype,
    ) -> None:
        self._prompt = prompt
        self._tokens = tokens
        self._checkpoints = checkpoints
        self._build = build
        self._codec = codec
        self._seed = seed
        self._dtype = dtype

    def on_run_end(self, loop: Loop, output_dir: Path) -> None:
        """Generate the text, print it and write it; warn where that fails."""
        try:
            text = self._text(loop)
            if text is None:
                return
            (output_dir / "sample.txt").write_text(text + "\n", encoding="utf-8")
        except Exception as error:  # of memory, for example: a model that trains on many GPUs may not fit whole on one
            fix = f"meshloom generate checkpoint={self._checkpoints} makes one, with no engine beside it"
            log.warning("trainer.sample_prompt: no sample, because of %s: %s; %s", type(error).__name__, error, fix)
            return
        print(f"\n{text}\n")

    def _text(self, loop: Loop) -> str | None:
        checkpoint = find_latest(self._checkpoints)
        if checkpoint is None:  # a branch of a finished run takes no step, and saves nothing
            log.warning("trainer.sample_prompt: no sample, because '%s' holds no checkpoint", self._checkpoints)
            return None
        model = load_whole_model(self._build(), checkpoint, loop.mesh.device, self._dtype)
        start, context = self._codec.encode(self._prompt), loop.horizon.seq_len
        (found,) = generate_texts(
            model, self._codec, [start], Sampling(), tokens=self._tokens, seed=self._seed, context=context
        )
        return self._prompt + found.text
