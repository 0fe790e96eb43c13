"""Local updating beside synchronous training, on islands of one host whose only way to each other is a slow link.

    python benchmarks/slow_links.py outputs/slow --input 'wiki/*.txt' --megabits 100 --milliseconds 100 --steps 33
    python benchmarks/slow_links.py outputs/loss --input 'wiki/*.txt' --steps 240 --draw loss.svg

Each island is a network namespace with a tunnel device. This process reads what they send, lets it pass at the link's rate,
and delivers it half a round trip later; it counts the bytes. It needs Linux, /dev/net/tun and the rights of root. Without
--megabits and --milliseconds the link is as fast as this process. Every method trains the same model on the same tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

PACKET = 65000  # bytes of a packet at most: few of them, for Python's sake
NEW_NETWORK = 0x40000000
TUNSETIFF, TUN, NO_INFO = 0x400454CA, 0x0001, 0x1000
METHODS = {
    "synchronous": [],
    "DiLoCo": ["dtype=fp32"],
    "DiLoCo, bf16": ["dtype=bf16"],
    "DiLoCo, int8": ["dtype=int8"],
    "local SGD": ["lr=1", "momentum=0", "nesterov=false"],
    "CO2": ["lr=0.5", "momentum=0", "nesterov=false", "delay={inner}"],
    "CO2, usual rate": ["lr=1", "momentum=0.2", "nesterov=false", "delay={inner}"],
    "streaming": ["fragments=2", "delay=2", "mix=0.5"],
}
WORDS = [
    "recipe=quickstart",
    "data=text",
    "data.vocabulary=2048",
    "data.seq_len=128",
    "data.validation=0.02",
    "model.layers=4",
    "model.dim=96",
    "model.ffn_dim=256",
    "batch.samples=32",
    "batch.micro=4",
    "trainer.eval_samples=64",
    "trainer.sample_prompt=null",
    "trainer.spike_sigmas=null",
    "checkpoint.every=0",
    "logging.progress=false",
    "parallel.zero=1",
    "parallel.timeout=600",
]


@dataclass
class Link:
    """The way out of one island: its rate in bytes a second (0: unlimited), and half a round trip in seconds."""

    rate: float
    delay: float
    sent: int = 0
    free_at: float = 0.0

    def arrival(self, size: int) -> float:
        """Return when a packet that leaves now is delivered."""
        now = time.monotonic()
        self.sent += size
        self.free_at = max(now, self.free_at) + (size / self.rate if self.rate else 0.0)
        return self.free_at + self.delay


class Switch:
    """Carries packets between tunnels: a thread reads each, and one delivers in order of arrival."""

    def __init__(self, tunnels: Sequence[int], rate: float, delay: float) -> None:
        self.links = [Link(rate, delay) for _ in tunnels]
        self._tunnels = tunnels
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._changed = threading.Condition()
        self._number = 0
        for island in range(len(tunnels)):
            threading.Thread(target=self._read, args=(island,), daemon=True).start()
        threading.Thread(target=self._deliver, daemon=True).start()

    def _read(self, island: int) -> None:
        while True:
            packet = os.read(self._tunnels[island], PACKET + 100)
            if packet[0] >> 4 != 4:  # of IPv6 the kernel speaks by itself
                continue
            to = packet[19] - 1  # 10.9.0.<island + 1>
            if 0 <= to < len(self._tunnels):
                with self._changed:
                    self._number += 1
                    heapq.heappush(self._waiting, (self.links[island].arrival(len(packet)), self._number, to, packet))
                    self._changed.notify()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                while (left := self._waiting[0][0] - time.monotonic() if self._waiting else None) is None or left > 0:
                    self._changed.wait(left)
                _, _, to, packet = heapq.heappop(self._waiting)
            os.write(self._tunnels[to], packet)


def enter_island(number: int, to_parent: socket.socket) -> None:
    """Move this process into a network of its own, with a tunnel whose other end the parent gets."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "unshare: no right to make a network namespace")
    tunnel = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tunnel, TUNSETIFF, struct.pack("16sH", b"island", TUN | NO_INFO))
    for command in (
        "ip link set lo up",
        f"ip addr add 10.9.0.{number + 1}/24 dev island",
        f"ip link set island mtu {PACKET} up",
    ):
        subprocess.run(command.split(), check=True)
    socket.send_fds(to_parent, [b"."], [tunnel])
    os.close(tunnel)


def start_island(number: int, islands: int, words: Sequence[str], log: Path) -> tuple[int, int]:
    """Fork the process of an island, which runs one rank. Return its id and its tunnel."""
    here, there = socket.socketpair()
    child = os.fork()
    if child:
        there.close()
        _, tunnels, _, _ = socket.recv_fds(here, 1, 1)
        here.close()
        return child, tunnels[0]
    code = 1
    try:
        enter_island(number, there)
        names = {"RANK": number, "WORLD_SIZE": islands, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 29500}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}}
        environment |= {"MASTER_ADDR": "10.9.0.1", "GLOO_SOCKET_IFNAME": "island", "OMP_NUM_THREADS": "1"}
        with log.open("w") as output:
            command = [sys.executable, "-m", "meshloom.launch.rank", *words]
            code = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False).returncode
    finally:
        os._exit(code)


def train(words: Sequence[str], islands: int, folder: Path, rate: float, delay: float) -> list[int]:
    """Train on islands; return the bytes that each has sent to the others."""
    folder.mkdir(parents=True, exist_ok=True)
    started = [start_island(number, islands, words, folder / f"island-{number}.log") for number in range(islands)]
    switch = Switch([tunnel for _, tunnel in started], rate, delay)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in started]
    if any(codes):
        raise SystemExit(f"exit codes {codes}: see {folder}/island-*.log")
    return [link.sent for link in switch.links]


def rows(folder: Path, key: str) -> dict[int, float]:
    """Step → number, of the rows of metrics.jsonl that have the key."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def method_words(method: str, islands: int, inner: int) -> list[str]:
    """Return the words of a method on so many islands, with so many inner steps."""
    words = [f"islands={islands}", f"inner_steps={inner}", *(word.format(inner=inner) for word in METHODS[method])]
    return [f"optim.local.{word}" for word in words] if METHODS[method] else []


def draw(path: Path, curves: dict[str, dict[int, float]], tokens: int) -> None:
    """Draw validation losses over tokens."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, curve in curves.items():
        axes.plot([step * tokens / 1e6 for step in curve], list(curve.values()), label=name, marker=".", linewidth=1)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("validation loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Train by every method, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--input", required=True, help="text to train on: a path or a glob pattern")
    parser.add_argument("--islands", type=int, default=2)
    parser.add_argument("--megabits", type=float, default=0.0, help="a second, out of each island; 0: unlimited")
    parser.add_argument("--milliseconds", type=float, default=0.0, help="of a round trip")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--inner", type=int, default=10, help="steps between two outer steps")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--draw", type=Path)
    arguments, more = parser.parse_known_args()
    curves: dict[str, dict[int, float]] = {}
    tokens = [0.0]
    print("| Method | loss at the end | bytes an island sends, per token | median seconds of a step | mean | longest |")
    print("|---|---|---|---|---|---|", flush=True)
    for method in arguments.methods:
        folder = (arguments.folder / method.replace(", ", "-").replace(" ", "-")).absolute()
        words = [*WORDS, f"data.input='{arguments.input}'", f"trainer.steps={arguments.steps}", f"output_dir={folder}"]
        words += [
            f"trainer.eval_every={max(20, arguments.steps // 10)}",
            *method_words(method, arguments.islands, arguments.inner),
            *more,
        ]
        if not (folder / "sent.json").exists():
            sent = train(words, arguments.islands, folder, arguments.megabits * 125_000, arguments.milliseconds / 2000)
            (folder / "sent.json").write_text(json.dumps(sent))
        sent = json.loads((folder / "sent.json").read_text())
        curves[method], tokens = rows(folder, "eval_loss"), list(rows(folder, "tokens").values())
        seconds = [value for step, value in rows(folder, "step_seconds").items() if step > 3]
        print(
            f"| {method} | {list(curves[method].values())[-1]:.3f} | {max(sent) / tokens[-1]:,.1f} |"
            f" {median(seconds):.2f} | {mean(seconds):.2f} | {max(seconds):.2f} |",
            flush=True,
        )
    if arguments.draw is not None:
        draw(arguments.draw, curves, round(tokens[-1] / arguments.steps))


if __name__ == "__main__":
    main()
