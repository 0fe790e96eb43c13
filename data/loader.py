"""Background loading: the next step's micro-batches are made while the GPU works on this one's.

The loader keeps no place in the data: it is asked for a global batch and gives this rank's share of it (R1). It guesses
that the next batch follows with the same size, prepares that one meanwhile, and throws it away when the guess was wrong
(a changed batch size, a resume, a skipped batch).
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from .assignment import Assigner, Share, load_share
from .batch import GlobalBatch, Samples


class Loader:
    """Micro-batches of one data-parallel rank.

    pin  put them in page-locked memory, so that copies to the GPU don't wait
    """

    def __init__(self, samples: Samples, assigner: Assigner, data_rank: int, pin: bool = False) -> None:
        self.samples = samples
        self.assigner = assigner
        self.data_rank = data_rank
        self._pin = pin
        self._device = torch.cuda.current_device() if pin else None
        self._worker = ThreadPoolExecutor(1, "data-loader", initializer=self._start)
        self._guess: tuple[GlobalBatch, int, Future[Share]] | None = None

    def load(self, batch: GlobalBatch, micro: int) -> Share:
        """This rank's share of a global batch, in micro-batches of `micro` samples.

        Whatever goes wrong while loading (a damaged shard, a token outside the vocabulary) is raised here.
        """
        guess, self._guess = self._guess, None
        if guess is not None and guess[:2] == (batch, micro):
            loading = guess[2]
        else:
            if guess is not None:
                guess[2].cancel()
            loading = self._worker.submit(self._make, batch, micro)
        result = loading.result()
        following = GlobalBatch(batch.first + batch.count, batch.count)
        self._guess = (following, micro, self._worker.submit(self._make, following, micro))
        return result

    def close(self) -> None:
        """End the thread; a guess under way is thrown away."""
        self._guess = None
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        # A new thread's current device is GPU 0: pinning there would open a context on it from every rank.
        if self._device is not None:
            torch.cuda.set_device(self._device)

    def _make(self, batch: GlobalBatch, micro: int) -> Share:
        share = load_share(self.samples, self.assigner.assign(batch, micro), self.data_rank)
        return replace(share, micro_batches=[each.pin() for each in share.micro_batches]) if self._pin else share
