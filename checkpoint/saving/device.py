"""From a GPU to host memory while it computes: the streams of the copies, and spare GPU memory for what would come too late."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

log = logging.getLogger(__name__)

# Copies to the host take turns on so many streams: while one sorts the next panels, the link carries the last ones'.
STREAMS = 2
HIGH_PRIORITY = -1  # sorting is short, and the link must not idle until a long matrix product gives way
SPARE_UNIT = 64 * 2**20
SPARE_MARGIN = 1.25
ALIGNMENT = 512


class Device:
    """One GPU's part in all saves of a process.

    A snapshot must have left the tensors before the next update. What the link to the host can't carry by then is first
    set aside in spare memory of the GPU, forty times as fast, and goes to the host from there. How much that has to be is
    learned from what earlier saves cost; it is never more than half of the memory that is free when it is taken.

    limit: most bytes of spare memory; None: as much as that.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self.device = device
        self.limit = limit
        self.streams = [torch.cuda.Stream(device, priority=HIGH_PRIORITY) for _ in range(STREAMS)]
        self.spare: list[torch.Tensor] = []
        self._wanted = 0
        self._short = False

    @property
    def spare_bytes(self) -> int:
        """GPU memory taken."""
        return sum(part.numel() for part in self.spare)

    def learn(self, stall: float, rate: float, size: int) -> None:
        """A snapshot of `size` bytes, on its way to the host at `rate` bytes a second, made the update wait `stall` seconds."""
        late = int(stall * rate * SPARE_MARGIN)
        if late >= SPARE_UNIT // 16:
            self._wanted = min(self.spare_bytes + late, size) // SPARE_UNIT * SPARE_UNIT + SPARE_UNIT

    def make_room(self) -> None:
        """Take the spare memory that the next snapshot should have, as far as it is there. Called from a save's thread."""
        missing = self._wanted - self.spare_bytes
        if missing <= 0 or self._short:
            return
        allowed = torch.cuda.mem_get_info(self.device)[0] // 2
        if self.limit is not None:
            allowed = min(allowed, self.limit - self.spare_bytes)
        size = min(missing, allowed) // SPARE_UNIT * SPARE_UNIT
        self._short = size < missing
        try:
            if size:
                with torch.cuda.stream(self.streams[0]):
                    self.spare.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        except torch.OutOfMemoryError:
            self._short = True
        if self._short:
            log.warning(
                "each save holds up the update: %.2f GiB more of GPU memory would avoid it, and are not free or not allowed "
                "(checkpoint.device_memory_gib)",
                (self._wanted - self.spare_bytes) / 2**30,
            )


def set_aside(sizes: Sequence[int], rooms: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """Choose which of the last copies, of these sizes in bytes, go into spare memory of these sizes.

    Returns the index of the first one that does, and for each from there on its room and where in it.
    """
    places: list[tuple[int, int]] = []
    index, room, used = len(sizes), 0, 0
    while index > 0 and room < len(rooms):
        if used + sizes[index - 1] > rooms[room]:
            room, used = room + 1, 0
            continue
        index -= 1
        places.append((room, used))
        used += -(-sizes[index] // ALIGNMENT) * ALIGNMENT
    return index, places[::-1]
