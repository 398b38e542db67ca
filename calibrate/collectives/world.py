"""The processes of one job: who they are, how they agree, how they end when one of them does not answer."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.collectives.groups import Group, host_identity
from moesim.errors import HardwareError, LayoutError, MeasurementError

__all__ = ["LAUNCH", "Rank", "RefusedError", "Watchdog", "World", "first_line", "rank_of"]

LAUNCH = "torchrun --nnodes 1 --nproc-per-node 8 -m calibrate run collectives -o FILE.csv"
ONE_GPU = {
    "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0", "NCCL_MAX_CTAS": "2", "NCCL_MULTI_RANK_GPU_ENABLE": "1",
}  # fmt: skip
"""Makes NCCL talk over loopback sockets between ranks of one GPU; what is set already stays."""


class RefusedError(MeasurementError):
    """A problem that all ranks know of, so that one may say it for all."""


@dataclass(frozen=True)
class Rank:
    """One process of the job, as the launcher numbered it."""

    rank: int
    n_ranks: int
    local_rank: int
    n_local: int
    """Ranks that this process's launcher started on its host."""


def rank_of(environment: Mapping[str, str]) -> Rank:
    """Read what torchrun tells its processes.

    Raises
    ------
    LayoutError
        If there is no launcher, or only one process.
    """
    try:
        n_ranks = int(environment.get("WORLD_SIZE", "1"))
        rank = int(environment.get("RANK", "0"))
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        n_local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError as error:
        rule = f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are whole numbers: {error}"
        raise LayoutError(rule, fix=f"let torchrun set them: {LAUNCH}") from None
    if n_ranks < 2:
        raise LayoutError("a collective is between two processes or more", value=n_ranks, fix=LAUNCH)
    return Rank(rank, n_ranks, local_rank, n_local)


class World:
    """All ranks, joined over gloo for what they have to agree on, and over the backend that is measured.

    Parameters
    ----------
    me
        This process.
    backend
        ``nccl`` or ``gloo``.
    timeout_s
        After which a rank that does not answer ends the job [s].
    one_gpu
        All ranks on one GPU, over sockets.

    Raises
    ------
    MeasurementError
        If the ranks do not meet.
    """

    def __init__(self, me: Rank, *, backend: str, timeout_s: float, one_gpu: bool) -> None:
        import torch
        import torch.distributed

        self.me, self.backend, self.one_gpu = me, backend, one_gpu
        self.torch: Any = torch
        self.dist: Any = torch.distributed
        self._timeout = timedelta(seconds=timeout_s)
        try:
            self.dist.init_process_group("gloo", rank=me.rank, world_size=me.n_ranks, timeout=self._timeout)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise MeasurementError(
                f"did not meet the other {me.n_ranks - 1} ranks there: {first_line(error)}",
                value=where,
                fix="check the rendezvous address, and GLOO_SOCKET_IFNAME where hosts have several networks",
            ) from error
        self.device = "cpu"

    def agree(self, problem: Exception | None) -> None:
        """Go on only if no rank has a problem; all ranks call this together.

        Raises
        ------
        RefusedError
            On every rank, with what the first one that has a problem says.
        """
        found: list[str | None] = [None] * self.me.n_ranks
        self.dist.all_gather_object(found, None if problem is None else str(problem))
        troubled = [(rank, said) for rank, said in enumerate(found) if said is not None]
        if troubled:
            rank, said = troubled[0]
            raise RefusedError(said if len(troubled) == len(found) or rank == 0 else f"rank {rank}: {said}")

    def take_device(self) -> None:
        """Set this rank's GPU, where the backend is NCCL.

        Raises
        ------
        HardwareError
            If it has none.
        """
        if self.backend != "nccl":
            return
        n_devices = self.torch.cuda.device_count() if self.torch.cuda.is_available() else 0
        index = 0 if self.one_gpu else self.me.local_rank
        if index >= n_devices or not self.dist.is_nccl_available():
            if self.one_gpu:
                raise HardwareError(
                    f"needs one CUDA GPU and NCCL: torch {self.torch.__version__} sees {n_devices}",
                    place="--one-gpu-sockets",
                    fix="run on a machine with a GPU, or use --backend gloo without it",
                )
            raise HardwareError(
                f"NCCL needs a CUDA GPU for every rank: torch {self.torch.__version__} sees {n_devices} for "
                f"{self.me.n_local} on this host",
                value="nccl",
                place="--backend",
                fix="use --backend gloo"
                + (", or start fewer ranks, or for one GPU --one-gpu-sockets" if n_devices else ""),
            )
        if self.one_gpu:
            for name, value in {**ONE_GPU, "NCCL_HOSTID": f"rank{self.me.rank}"}.items():
                os.environ.setdefault(name, value)
        self.torch.cuda.set_device(index)
        self.device = f"cuda:{index}"

    def hosts(self) -> list[str]:
        """Identity of every rank's host."""
        found: list[str] = [""] * self.me.n_ranks
        self.dist.all_gather_object(found, host_identity())
        return found

    def join(self, groups: list[Group]) -> list[tuple[Any, Any]]:
        """Handles of each group: that which is measured, and one over gloo to start together."""
        return [
            (
                self.dist.new_group(list(group.ranks), backend=self.backend, timeout=self._timeout),
                self.dist.new_group(list(group.ranks), backend="gloo", timeout=self._timeout),
            )
            for group in groups
        ]

    def told(self, value: Any = None) -> Any:
        """Hand rank 0's `value` to all."""
        cell = [value]
        self.dist.broadcast_object_list(cell, src=0)
        return cell[0]

    def command(self, number: int = 0) -> int:
        """Hand rank 0's whole number to all; cheaper than `told`."""
        cell = self.torch.tensor([number], dtype=self.torch.int64)
        self.dist.broadcast(cell, src=0)
        return int(cell[0])

    def largest(self, value: float) -> float:
        """Largest of a figure over all ranks."""
        cell = self.torch.tensor([value], dtype=self.torch.float64)
        self.dist.all_reduce(cell, op=self.dist.ReduceOp.MAX)
        return float(cell[0])

    def gathered(self, values: np.ndarray) -> np.ndarray | None:
        """Stack every rank's array of one shape on rank 0: (n_ranks, ...); None elsewhere."""
        mine = self.torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        first = self.me.rank == 0
        found = [self.torch.empty_like(mine) for _ in range(self.me.n_ranks)] if first else None
        self.dist.gather(mine, found, dst=0)
        return np.stack([one.numpy() for one in found]) if found else None

    def synchronize(self) -> None:
        """Wait for this rank's GPU, where it has one."""
        if self.device != "cpu":
            self.torch.cuda.synchronize()

    def free_bytes(self) -> float:
        """Memory that this rank may fill."""
        if self.device != "cpu":
            shared = self.me.n_local if self.one_gpu else 1
            return float(self.torch.cuda.mem_get_info()[0]) / shared
        return available_bytes() / self.me.n_local

    def software(self) -> str:
        """Versions that decide a time."""
        version = f"torch {self.torch.__version__}"
        if self.backend != "nccl":
            return f"gloo of {version}"
        nccl = ".".join(str(part) for part in self.torch.cuda.nccl.version())
        return f"nccl {nccl}, {version}"

    def close(self) -> None:
        """Part in good order."""
        self.dist.barrier()
        self.dist.destroy_process_group()


def available_bytes() -> float:
    """Memory of this host that can be had without swapping [bytes]."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as stream:
            found = dict(line.split(":", 1) for line in stream)
        return float(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return float(2**31)


def first_line(error: BaseException) -> str:
    """What an error of torch says, without its stack."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].removeprefix("[Rank ").strip()[:200]


class Watchdog:
    """Ends the process if a point takes too long: a rank that hangs in a driver cannot be told anything.

    Parameters
    ----------
    limit_s
        Longest that one point may take [s].
    rank
        Named in the message.
    """

    def __init__(self, limit_s: float, rank: int) -> None:
        self._limit_s, self._rank = limit_s, rank
        self._deadline_s = time.monotonic() + limit_s
        self._what = "the start"
        threading.Thread(target=self._watch, daemon=True).start()

    def expect(self, what: str) -> None:
        """Begin something that must end within the limit."""
        self._what, self._deadline_s = what, time.monotonic() + self._limit_s

    def _watch(self) -> None:
        while (left_s := self._deadline_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 1.0))
        sys.stderr.write(f"rank {self._rank}: {self._what} did not end within {self._limit_s:g} s; stopped\n")
        sys.stderr.flush()
        os._exit(1)
