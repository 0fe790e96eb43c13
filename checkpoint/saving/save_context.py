"""The objects that all saves of a Checkpointer share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from ..config import CheckpointConfig
from ..memory.tier import MemoryTier, Predecessors
from ..planning.planner import Planner
from ..writing.writer import Writer
from .commit import Target
from .device import Device
from .staging import StagingPool


@dataclass
class SaveContext:
    """The target of saves, and what they are made with.

    planned  set unless a plan is being made before the first save
    """

    target: Target
    pool: StagingPool
    writer: Writer
    planner: Planner
    memory: MemoryTier | None
    predecessors: Predecessors | None
    config: CheckpointConfig
    device: Device | None = None
    planned: threading.Event = field(default_factory=threading.Event)
    tidying: threading.Lock = field(default_factory=threading.Lock)  # one save's thread at a time
