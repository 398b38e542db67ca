"""Hosts of one machine joined by links of known rate and delay: network namespaces, TAP devices, a switch in Python.

Run as a program it builds the hosts and forwards frames until its standard input closes or it is told to end:

    python emulated_links.py PREFIX N_HOSTS RATE_BITS_PER_S DELAY_S

Needs root on Linux. Host ``i`` is the namespace ``PREFIX{i}`` with address 10.213.0.(i + 1). A frame leaves its
host's port at the line's rate, crosses the switch in `DELAY_S` and enters the other port at the line's rate, cut
through: on an idle line its last bit arrives DELAY_S + bits / rate after its first bit left. Ports have no end of
memory, so nothing is lost. Only frames count, so the payload's rate is some 4% below the line's.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SUBNET = "10.213.0."
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
TAP, NO_PACKET_INFO, WITH_OFFLOAD_HEADER = 0x0002, 0x1000, 0x4000
CHECKSUM, LARGE_SEGMENTS = 0x01, 0x02 | 0x04
OFFLOAD_HEADER = 10
"""Bytes before a frame that say how a large segment is to be cut."""
FRAME_HEADERS = 66
"""Ethernet, IPv4 and TCP with time stamps [bytes]."""
SPIN_S = 1.5e-4
"""Nearer than this to a deadline the switch polls: a sleep ends late by about as much."""


def why_impossible() -> str | None:
    """Say why hosts cannot be emulated here, or None."""
    if sys.platform != "linux":
        return "emulated links need Linux"
    if os.geteuid() != 0:
        return "emulated links need root (network namespaces)"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
        done = subprocess.run(["ip", "netns", "list"], capture_output=True, check=False, timeout=10)
    except OSError as error:
        return f"emulated links need /dev/net/tun and ip: {error}"
    return None if done.returncode == 0 else "emulated links need `ip netns`"


@contextlib.contextmanager
def emulated_cluster(n_hosts: int, rate_bits_per_s: float, delay_s: float) -> Iterator[list[str]]:
    """Join hosts for the time of a block; gives the names of their namespaces."""
    prefix = f"moesim{os.getpid()}-"
    command = [
        sys.executable,
        str(Path(__file__)),
        prefix,
        str(n_hosts),
        str(rate_bits_per_s),
        str(delay_s),
    ]
    switch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if switch.stdout is None or switch.stdout.readline().strip() != "ready":
            raise RuntimeError("the emulated switch did not start")
        yield [f"{prefix}{i}" for i in range(n_hosts)]
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            switch.communicate(timeout=20)  # closes its standard input
        switch.kill()
        switch.wait()
        remove_hosts(prefix, n_hosts)


def remove_hosts(prefix: str, n_hosts: int) -> None:
    """Delete the namespaces; those that are gone are no matter."""
    for i in range(n_hosts):
        subprocess.run(["ip", "netns", "del", f"{prefix}{i}"], capture_output=True, check=False)


def build_host(prefix: str, i: int, n_hosts: int) -> int:
    """Make one namespace with its port; gives the switch's end of the line."""
    namespace, device = f"{prefix}{i}", f"mst{os.getpid() % 100000}-{i}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    line = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = TAP | NO_PACKET_INFO | WITH_OFFLOAD_HEADER
    fcntl.ioctl(line, TUNSETIFF, struct.pack("16sH22x", device.encode(), flags))
    fcntl.ioctl(line, TUNSETOFFLOAD, CHECKSUM | LARGE_SEGMENTS)
    subprocess.run(["ip", "link", "set", device, "netns", namespace], check=True)
    others = [j for j in range(n_hosts) if j != i]
    script = [
        "link set lo up",
        f"link set {device} address 02:00:00:00:00:{i:02x} name eth0 txqueuelen 10000",
        f"addr add {SUBNET}{i + 1}/24 dev eth0",
        "link set eth0 up",
        *(
            f"neigh replace {SUBNET}{j + 1} lladdr 02:00:00:00:00:{j:02x} dev eth0 nud permanent"
            for j in others
        ),
    ]
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], input="\n".join(script), text=True, check=True)
    return line


def bytes_on_line(frame: bytes) -> int:
    """Bytes of a frame as the line carries it: a large segment goes in pieces that each have headers."""
    size = len(frame) - OFFLOAD_HEADER
    piece = int.from_bytes(frame[4:6], "little") if frame[1] else 0
    return size + (-(-(size - FRAME_HEADERS) // piece) - 1) * FRAME_HEADERS if piece else size


class Switch:
    """Ports with a rate, and what is under way between them."""

    def __init__(self, lines: list[int], rate_bytes_per_s: float, delay_s: float) -> None:
        self.lines, self.rate, self.delay_s = lines, rate_bytes_per_s, delay_s
        self.source = {line: i for i, line in enumerate(lines)}
        self.leaves_s = [0.0] * len(lines)
        self.enters_s = [0.0] * len(lines)
        self.under_way: list[tuple[float, int, int, bytes]] = []
        self.n_frames = 0

    def take(self, line: int, frame: bytes, now_s: float) -> None:
        """Put a frame on its way."""
        target = frame[OFFLOAD_HEADER + 5]  # last byte of the destination's address
        if frame[OFFLOAD_HEADER] != 2 or target >= len(self.lines):
            return  # no host's address: broadcasts of IPv6 and the like
        source, length_s = self.source[line], bytes_on_line(frame) / self.rate
        self.leaves_s[source] = max(now_s, self.leaves_s[source]) + length_s
        arrives_s = max(self.leaves_s[source] + self.delay_s, self.enters_s[target] + length_s)
        self.enters_s[target] = arrives_s
        self.n_frames += 1
        heapq.heappush(self.under_way, (arrives_s, self.n_frames, target, frame))

    def deliver(self, now_s: float) -> None:
        """Hand over what has arrived."""
        while self.under_way and self.under_way[0][0] <= now_s:
            _, _, target, frame = heapq.heappop(self.under_way)
            with contextlib.suppress(OSError):
                os.write(self.lines[target], frame)

    def wait_s(self, now_s: float) -> float:
        """How long the switch may sleep; 0 where the next frame is due shortly."""
        left_s = self.under_way[0][0] - now_s - SPIN_S if self.under_way else 1.0
        return max(0.0, left_s)

    def forward(self, stop: int) -> None:
        """Forward until `stop` can be read, which a closed pipe can."""
        waiting = [*self.lines, stop]
        while True:
            # select, for its microseconds: epoll sleeps in whole milliseconds
            ready, _, _ = select.select(waiting, [], [], self.wait_s(time.perf_counter()))
            self.deliver(time.perf_counter())
            for line in ready:
                if line == stop:
                    return
                with contextlib.suppress(BlockingIOError):
                    for _ in range(8):
                        frame = os.read(line, 70000)
                        self.take(line, frame, time.perf_counter())


def main() -> None:
    """Build, forward, remove."""
    prefix, n_hosts, rate, delay_s = (
        sys.argv[1],
        int(sys.argv[2]),
        float(sys.argv[3]) / 8,
        float(sys.argv[4]),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        lines = [build_host(prefix, i, n_hosts) for i in range(n_hosts)]
        with contextlib.suppress(OSError):  # its delays are the truth: it goes before all other work
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        print("ready", flush=True)
        Switch(lines, rate, delay_s).forward(sys.stdin.fileno())
    finally:
        remove_hosts(prefix, n_hosts)


if __name__ == "__main__":
    main()
