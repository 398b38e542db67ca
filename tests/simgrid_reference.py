"""Flows of one case solved by SimGrid (4.1; ``pip install 'moesim[bench]'``, built from source: needs Boost's headers).

Run as ``python tests/simgrid_reference.py CASE.npz OUT.npz`` in a process of its own, since SimGrid has one engine a
process. Raw network model: no TCP window, latency or bandwidth corrections; latency is a delayed start.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from math import ceil, sqrt
from pathlib import Path

import numpy as np

COLUMNS = ("links", "routes", "flow_bytes", "latency_s")


def solve_with_simgrid(*case: np.ndarray) -> tuple[np.ndarray, float]:
    """Finish times [s], and SimGrid's own CPU time [s] without its start; arguments as `solve_flows`."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "case.npz"), Path(folder, "found.npz")
        np.savez(given, **dict(zip(COLUMNS, case, strict=True)))
        subprocess.run([sys.executable, __file__, str(given), str(found)], check=True, capture_output=True)
        with np.load(found, allow_pickle=False) as told:
            return told["finish_s"], float(told["cpu_s"])


def _main(given: str, found: str) -> None:
    spec = find_spec("simgrid")
    library = Path(spec.origin or "").parent / "libsimgrid.so"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # the wheel does not find its own library
    import simgrid

    with np.load(given, allow_pickle=False) as file:
        links, routes, flow_bytes, latency_s = (file[name] for name in COLUMNS)
    options = ("network/model:raw", "network/optim:Full", "network/crosstraffic:0")
    engine = simgrid.Engine(["case", *(f"--cfg={option}" for option in options), "--log=root.thres:error"])
    zone = engine.netzone_root.add_netzone_full("zone")
    wires = [zone.add_link(f"l{number}", float(rate)) for number, rate in enumerate(links)]
    # a pair of hosts is one flow; few hosts, since the routes of a zone are a table of all pairs
    n_hosts = ceil(sqrt(len(routes)))
    hosts = [[zone.add_host(f"{end}{number}", 1e9) for number in range(n_hosts)] for end in "ab"]
    ends = [(hosts[0][number // n_hosts], hosts[1][number % n_hosts]) for number in range(len(routes))]
    for pair, route in zip(ends, routes, strict=True):
        zone.add_route(*pair, [wires[link] for link in route if link >= 0])
    zone.seal()
    finish_s = np.zeros(len(routes))

    def transfers(wait_s: float) -> None:
        simgrid.this_actor.sleep_for(float(wait_s))
        numbers = np.flatnonzero(latency_s == wait_s)
        flows = [simgrid.Comm.sendto_async(*ends[number], int(flow_bytes[number])) for number in numbers]
        for number, flow in zip(numbers, flows, strict=True):
            flow.wait()
            finish_s[number] = flow.finish_time

    for wait_s in np.unique(latency_s):
        hosts[0][0].add_actor(f"after {wait_s}", transfers, wait_s)
    started_s = time.process_time()
    engine.run()
    np.savez(found, finish_s=finish_s, cpu_s=time.process_time() - started_s)


if __name__ == "__main__":
    _main(*sys.argv[1:])
