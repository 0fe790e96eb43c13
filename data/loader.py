"""Background loading: the next step's micro-batches are made while the GPU works on this one's.

The loader keeps no position in the data: it loads this rank's share of whichever global batch it is given (R1). It
prefetches the batch that follows with the same size, and discards it when another is loaded (a changed batch size, a
resume, a skipped batch), or the same dealt in another way.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from .assignment import Dealer, Share
from .batch import GlobalBatch, Samples


class Loader:
    """Loader of the micro-batches of one data-parallel rank.

    pin  put them in page-locked memory, so that copies to the GPU don't wait
    """

    def __init__(self, samples: Samples, dealer: Dealer, data_rank: int, pin: bool = False) -> None:
        self.samples = samples
        self.dealer = dealer
        self.data_rank = data_rank
        self._pin = pin
        self._device = torch.cuda.current_device() if pin else None
        self._worker = ThreadPoolExecutor(1, "data-loader", initializer=self._start)
        self._prefetched: tuple[GlobalBatch, int, bool, Future[Share]] | None = None

    def load(self, batch: GlobalBatch, micro: int, *, by_worker: bool = False, next_by_worker: bool = False) -> Share:
        """Load this rank's share of a global batch, in micro-batches of `micro` samples.

        by_worker: see `Dealer.load`; next_by_worker: whether the batch that follows will be loaded so
        Raises here what goes wrong while loading (a damaged shard, a token outside the vocabulary).
        """
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched[:3] == (batch, micro, by_worker):
            loading = prefetched[3]
        else:
            if prefetched is not None:
                prefetched[3].cancel()
            loading = self._worker.submit(self._make, batch, micro, by_worker)
        result = loading.result()
        following = GlobalBatch(batch.first + batch.count, batch.count)
        making = self._worker.submit(self._make, following, micro, next_by_worker)
        self._prefetched = (following, micro, next_by_worker, making)
        return result

    def close(self) -> None:
        """End the thread, and discard a prefetched batch."""
        self._prefetched = None
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        # A new thread's current device is GPU 0: pinning there would open a context on it from every rank.
        if self._device is not None:
            torch.cuda.set_device(self._device)

    def _make(self, batch: GlobalBatch, micro: int, by_worker: bool) -> Share:
        share = self.dealer.load(self.samples, batch, micro, self.data_rank, by_worker=by_worker)
        return replace(share, micro_batches=[each.pin() for each in share.micro_batches]) if self._pin else share
