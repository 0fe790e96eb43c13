"""The objects that all saves of a Checkpointer share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from .commit import Target
from .config import CheckpointConfig
from .control import Round
from .device import Device
from .memory.tier import MemoryTier, Predecessors
from .planner import Planner
from .staging import StagingPool
from .writing.writer import Writer


@dataclass
class SaveContext:
    """The target of saves, what they are made with, and the rounds of messages that are not forgotten yet."""

    target: Target
    pool: StagingPool
    writer: Writer
    planner: Planner
    memory: MemoryTier | None
    predecessors: Predecessors | None
    config: CheckpointConfig
    device: Device | None = None
    rounds: list[Round] = field(default_factory=list[Round])
    tidying: threading.Lock = field(default_factory=threading.Lock)  # one save's thread at a time
