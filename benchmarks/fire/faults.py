"""Faults, and schedules of them that are drawn at random from a seed. No PyTorch."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

STEPS = 20
"""Length of a run. It is longer where a spike needs the guard's statistic, or a slow rank has to be slow for a while."""
LONG_STEPS = 80
SPIKE_FROM, SLOW_UNTIL = 67, 40
BATCH = 8
EVALUATE_EVERY, SAVE_EVERY, COMPARE_EVERY = 4, 5, 3

PHASES = ("data", "forward", "backward", "exchange", "update", "save", "evaluation")
IN_A_STEP = ("data", "forward", "backward", "exchange", "update")

CRASHES = ("kill", "exit", "raise")
HANGS = ("stop", "hang")
NUMBERS = ("nan_activation", "nan_gradient", "spike")
FLIPS = ("flip_weight", "flip_optimizer", "flip_activation", "flip_gradient")
LOST_PARENTS = ("kill_agent", "kill_launcher")
SURROUNDINGS = ("full_disk", "clock", "slow")
LONG = ("spike", "slow")
OF_MACHINES = ("kill_node", "late_node")
"""Faults of a run on several machines: an agent is killed, and its ranks die with it, or a launcher is started late."""
ENDLESS = ("kill_again",)
"""Strikes in each attempt, so that the run makes no progress."""
KINDS = (*CRASHES, *HANGS, *NUMBERS, *FLIPS, *LOST_PARENTS, *SURROUNDINGS, "bad_sample", *OF_MACHINES, *ENDLESS)


@dataclass(frozen=True)
class Fault:
    """One fault. It strikes once, however often the run is started again or a step is taken again, unless it says otherwise.

    kind   one of KINDS
    rank   the rank that it strikes
    step   from which step on, counted from 1: it strikes in the first part of a step of this phase
    phase  the part of a step in which it strikes
    seed   chooses what is left to choose: the element, the bit, the block
    size   seconds of a slow step or a late machine, hours of a step of the clock, the sample of `bad_sample`
    """

    kind: str
    rank: int
    step: int
    phase: str = "data"
    seed: int = 0
    size: float = 0.0


@dataclass(frozen=True)
class Layout:
    """The layout of a run: its number of processes, the words of its command line, and its number of launchers."""

    name: str
    ranks: int
    words: tuple[str, ...]
    machines: int = 1


LAYOUTS = (
    Layout("ZeRO-0", 2, ("parallel.zero=0",)),
    Layout("ZeRO-1", 2, ("parallel.zero=1",)),
    Layout("ZeRO-2", 2, ("parallel.zero=2",)),
    Layout("ZeRO-3", 2, ("parallel.zero=3",)),
    Layout("TP 2", 2, ("parallel.tp=2", "parallel.zero=0")),
    Layout("PP 2", 2, ("parallel.pp=2", "parallel.zero=0")),
    Layout("CP 2", 2, ("parallel.cp=2", "parallel.zero=0")),
    Layout("ZeRO-0", 3, ("parallel.zero=0",)),
    Layout("ZeRO-1", 3, ("parallel.zero=1",)),
    Layout("ZeRO-3", 3, ("parallel.zero=3",)),
    Layout("ZeRO-0", 4, ("parallel.zero=0",)),
    Layout("2 × ZeRO-3", 4, ("parallel.zero=3", "parallel.replicate=2")),
    Layout("TP 2, ZeRO-0", 4, ("parallel.tp=2", "parallel.zero=0")),
    Layout("PP 2, ZeRO-1", 4, ("parallel.pp=2", "parallel.zero=1")),
)

SEVERAL_MACHINES = (
    Layout("2 machines, ZeRO-0", 2, ("parallel.zero=0",), 2),
    Layout("2 machines, ZeRO-3", 2, ("parallel.zero=3",), 2),
    Layout("2 machines, ZeRO-1", 4, ("parallel.zero=1",), 2),
    Layout("3 machines, ZeRO-1", 3, ("parallel.zero=1",), 3),
)


@dataclass(frozen=True)
class Schedule:
    """A run and the faults that strike it.

    layout  of its processes
    words   further words of its command line
    """

    number: int
    layout: Layout
    faults: tuple[Fault, ...]
    words: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """The length of the run."""
        return LONG_STEPS if any(each.kind in LONG for each in self.faults) else STEPS

    def write(self, path: Path) -> None:
        """Write the faults for the injector."""
        path.write_text(json.dumps([asdict(each) for each in self.faults]))


def read_faults(path: Path) -> list[Fault]:
    """Read what `Schedule.write` has written."""
    return [Fault(**each) for each in json.loads(path.read_text())]


@dataclass(frozen=True)
class Odds:
    """The weight by which each kind is drawn, and the numbers of faults of a run that are drawn from."""

    weights: Mapping[str, float] = field(
        default_factory=lambda: {
            **dict.fromkeys(CRASHES, 1.0),
            "stop": 1.5,
            "hang": 0.4,  # each takes ten seconds to be named
            **dict.fromkeys(NUMBERS, 1.0),
            "spike": 0.4,
            **dict.fromkeys(FLIPS, 1.5),
            **dict.fromkeys(LOST_PARENTS, 0.5),
            **dict.fromkeys(SURROUNDINGS, 0.5),
            "bad_sample": 0.3,
            **dict.fromkeys(OF_MACHINES, 0.6),
            **dict.fromkeys(ENDLESS, 0.3),
        }
    )
    counts: Sequence[int] = (1, 1, 1, 2, 2, 3)


def draw(seed: int, number: int, odds: Odds | None = None) -> Schedule:
    """Draw the schedule of a number, the same for the same seed."""
    odds = odds or Odds()
    chance = random.Random(f"{seed}/{number}")
    count = chance.choice(odds.counts)
    kinds = chance.choices(list(odds.weights), list(odds.weights.values()), k=count)
    count = 1 if kinds[0] in (*OF_MACHINES, *ENDLESS) else count
    kinds = kinds[:count]
    layouts = SEVERAL_MACHINES if kinds[0] in OF_MACHINES else LAYOUTS
    if "bad_sample" in kinds:  # under context parallelism no rank sees a whole one
        layouts = [each for each in layouts if not each.name.startswith("CP")]
    layout = chance.choice(layouts)
    # One spike or bad sample tells what a run is compared with; more of them would only take longer.
    alone = (*LONG, "bad_sample", *OF_MACHINES, *ENDLESS)
    kinds = ["kill" if kind in alone and place else kind for place, kind in enumerate(kinds)]
    first, last = {"spike": (SPIKE_FROM, LONG_STEPS - 6), "slow": (12, SLOW_UNTIL)}.get(kinds[0], (4, STEPS - 3))
    steps = sorted(chance.sample(range(first, last, 2), count))
    faults = tuple(_fault(chance, kind, step, layout) for kind, step in zip(kinds, steps, strict=True))
    words = [f"checkpoint.mode={chance.choice(('sync', 'async'))}"]
    if "bad_sample" in kinds or chance.random() < 0.5:
        words.append("trainer.on_bad_step=rewind")
    return Schedule(number, layout, faults, tuple(words))


def _fault(chance: random.Random, kind: str, step: int, layout: Layout) -> Fault:
    anywhere = kind in (*CRASHES, *HANGS, *LOST_PARENTS, "kill_node")
    phases = PHASES if anywhere else ("data", "update") if kind in FLIPS[:2] else IN_A_STEP[:1]
    sample = float(BATCH * (step - 1) + 3)
    size = {"slow": 0.2, "late_node": 4.0, "clock": chance.choice((-5.0, 5.0)), "bad_sample": sample}.get(kind, 0.0)
    return Fault(kind, chance.randrange(layout.ranks), step, chance.choice(phases), chance.getrandbits(32), size)


def every_phase(times: int, kind: str = "stop") -> Iterator[Schedule]:
    """Yield schedules in which a fault of one kind strikes in each phase, `times` times, on layouts and ranks in turn."""
    number = 0
    for turn in range(times):
        for phase in PHASES:
            layout = LAYOUTS[(number + turn) % len(LAYOUTS)]
            fault = Fault(kind, number % layout.ranks, 9 + turn % 5, phase)
            yield Schedule(number, layout, (fault,))
            number += 1
