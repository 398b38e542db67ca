"""Start the ranks of a job as a launcher would, but import torch once: a forked rank is up at once.

As a program:  python rank_launcher.py FOLDER N_RANKS NAMESPACES ARGUMENTS...
with NAMESPACES the network namespaces of the ranks, with commas between, or nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET


@dataclass(frozen=True)
class Said:
    """How one rank ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines of ours; torch has its own."""
        return [line for line in self.err.splitlines() if line.startswith("moesim: ")]


@dataclass
class Job:
    """A job that runs."""

    process: subprocess.Popen[str]
    folder: Path
    pids: list[int]

    def end(self, timeout_s: float = 120) -> list[Said]:
        """Wait for every rank."""
        said, _ = self.process.communicate(timeout=timeout_s)
        return [
            Said(
                int(code),
                (self.folder / f"{rank}.out").read_text(),
                (self.folder / f"{rank}.err").read_text(),
            )
            for rank, code in enumerate(said.split())
        ]


@contextlib.contextmanager
def job(
    folder: Path, n_ranks: int, *options: str, namespaces: Sequence[str] = (), address: str = "127.0.0.1",
    interface: str = "lo",
) -> Iterator[Job]:  # fmt: skip
    """Run ``calibrate run collectives`` on some ranks; none outlives the block."""
    with socket.socket() as one:  # a port that was free a moment ago
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = {
        **os.environ, "WORLD_SIZE": str(n_ranks), "MASTER_ADDR": address, "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": "1" if namespaces else str(n_ranks), "GLOO_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__)), str(folder), str(n_ranks), ",".join(namespaces)]
    process = subprocess.Popen(
        [*command, "run", "collectives", *options],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    pids: list[int] = []
    try:
        if process.stdout is None:
            raise RuntimeError("the launcher has no output")
        pids += [int(word) for word in process.stdout.readline().split()]
        yield Job(process, folder, pids)
    finally:
        process.kill()
        process.communicate()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)


def become(rank: int, folder: str, namespace: str) -> None:
    """Make this forked process a rank, with files of its own and perhaps a network of its own."""
    if namespace:
        handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(handle, NETWORK_NAMESPACE):
            raise OSError(ctypes.get_errno(), "setns")
    local = "0" if namespace else str(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=local)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)


def main() -> None:
    """Import, fork, wait; prints the ranks' process ids, and later their exit codes."""
    import torch.distributed  # noqa: F401  # all of it once, for every rank

    import calibrate.collectives.book
    import calibrate.collectives.run
    import calibrate.collectives.splits
    import calibrate.run.command  # noqa: F401
    from calibrate.app import main as calibrate_main

    folder, n_ranks, names = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
    sys.argv = ["calibrate", *sys.argv[4:]]
    pids = []
    for rank in range(n_ranks):
        pid = os.fork()
        if pid == 0:
            become(rank, folder, names[rank] if len(names) > 1 else "")
            calibrate_main()
            sys.exit(0)
        pids.append(pid)
    print(*pids, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), flush=True)


if __name__ == "__main__":
    main()
