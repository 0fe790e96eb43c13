"""Take the network between two nodes away, for a while or for good: what each node says, when it ends, and the losses.

    python benchmarks/network_partition.py --seconds 3        the link comes back
    python benchmarks/network_partition.py --seconds 0        it does not; both nodes are started again when they have ended

Nodes are network namespaces of this machine, joined by a pair of virtual interfaces, of which one is taken down. Needs root.
Ranks are on CPU, in float64; losses are held to a run of one process that nothing disturbs.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from meshloom.benchmarks.fire.trial import RECIPE, Bench, read_losses
from meshloom.trainer.watch.incidents import read_incidents

NODES = ("fire0", "fire1")
STEPS = 180
"""More would say nothing: from about 300 steps on this run amplifies the rounding of sums, which depends on the layout."""
BEGUN = 20
PATIENCE = 240.0


def ip(*words: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *words], check=True)


class Network:
    """Two namespaces and the link between them."""

    def __enter__(self) -> Network:
        """Make them anew."""
        self.__exit__()
        for node in NODES:
            ip("netns", "add", node)
        ip("link", "add", "veth0", "netns", NODES[0], "type", "veth", "peer", "name", "veth1", "netns", NODES[1])
        for number, node in enumerate(NODES):
            ip("-n", node, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"veth{number}")
            for device in ("lo", f"veth{number}"):
                ip("-n", node, "link", "set", device, "up")
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove them."""
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], check=False, stderr=subprocess.DEVNULL)

    def set(self, state: str) -> None:
        """Take the link up or down."""
        ip("-n", NODES[1], "link", "set", "veth1", state)


def start(folder: Path, turn: int) -> list[subprocess.Popen[bytes]]:
    """Start both nodes of the run."""
    started = []
    for number, node in enumerate(NODES):
        words = [*RECIPE, f"trainer.steps={STEPS}", "parallel.zero=0", "resume=auto", f"output_dir={folder / 'run'}"]
        flags = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29511"]
        flags += [f"--rdzv-id={turn}", f"--local-addr=10.77.0.{number + 1}", f"--node-rank={number}", "--max-restarts=0"]
        flags += [f"--rdzv-conf=is_host={int(number == 0)}"]
        command = ["ip", "netns", "exec", node, sys.executable, "-m", "meshloom.launch.torchrun", *flags]
        variables = {**os.environ, "GLOO_SOCKET_IFNAME": f"veth{number}", "OMP_NUM_THREADS": "1"}
        with (folder / f"log-{number}").open("a") as log:
            started.append(
                subprocess.Popen([*command, "-m", "meshloom.launch.rank", *words], env=variables, stdout=log, stderr=log)
            )
    return started


def wait_for_steps(folder: Path, nodes: list[subprocess.Popen[bytes]], count: int) -> None:
    """Wait until so many steps are done."""
    deadline = time.monotonic() + PATIENCE
    while len(read_losses(folder / "run")[0]) < count:
        if time.monotonic() > deadline or all(node.poll() is not None for node in nodes):
            raise SystemExit("the run did not begin:\n" + "".join(each.read_text() for each in folder.glob("log-*")))
        time.sleep(0.1)


def wait_for_end(nodes: list[subprocess.Popen[bytes]], began: float) -> None:
    """Wait for the end of both nodes, and print when each has ended."""
    left = dict(enumerate(nodes))
    while left and time.monotonic() - began < PATIENCE:
        for number, node in [*left.items()]:
            if node.poll() is not None:
                print(f"node {number} ended with code {node.poll()} after {time.monotonic() - began:.1f} s", flush=True)
                del left[number]
        time.sleep(0.1)
    for number, node in left.items():
        print(f"node {number} still ran after {PATIENCE:.0f} s, and is killed", flush=True)
        node.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(5)


def main() -> None:
    """Take the link away, and print what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for how long the link is down; 0: until both have ended")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="meshloom-fire-") as name, Network() as network:
        folder = Path(name)
        nodes = start(folder, 0)
        wait_for_steps(folder, nodes, BEGUN)
        network.set("down")
        began, at = time.monotonic(), time.time()
        if arguments.seconds:
            time.sleep(arguments.seconds)
            network.set("up")
        wait_for_end(nodes, began)
        if not arguments.seconds:
            network.set("up")
            wait_for_end(start(folder, 1), time.monotonic())
        for each in read_incidents(folder / "run"):
            print(f"{each['kind']} after {each['time'] - at:.1f} s: {each['message']}")
        (folder / "alone").mkdir()
        undisturbed = Bench().undisturbed(folder / "alone", STEPS)
        found = read_losses(folder / "run")[0]
        apart = max((abs(found.get(step, 0.0) - loss) / loss for step, loss in undisturbed.items()), default=0.0)
        print(f"{len(found)} of {STEPS} steps; losses at most {apart:.1e} from an undisturbed run")
        for path in sorted(folder.glob("log-*")):
            print(
                f"--- {path.name}\n"
                + "\n".join(line for line in path.read_text().splitlines() if "frame #" not in line)[-3000:]
            )


if __name__ == "__main__":
    main()
