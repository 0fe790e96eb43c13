"""The objects that all saves of a Checkpointer share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from .arena import ArenaPool
from .commit import Target
from .config import CheckpointConfig
from .control import Round
from .device import Device
from .memory.tier import MemoryTier, Predecessors
from .planner import Planner
from .writing.writer import Writer


@dataclass
class Tools:
    """The target and the tools of saves, and the agreements that are still remembered."""

    target: Target
    pool: ArenaPool
    writer: Writer
    planner: Planner
    memory: MemoryTier | None
    predecessors: Predecessors | None
    config: CheckpointConfig
    device: Device | None = None
    rounds: list[Round] = field(default_factory=list[Round])
    tidying: threading.Lock = field(default_factory=threading.Lock)  # one save's thread at a time
