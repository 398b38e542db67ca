"""One measurement of a job's collectives: rank 0 says what comes next and writes, the others follow.

What only rank 0 needs is imported there: hundreds of ranks start the quicker.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibrate.collectives.groups import Group, groups_of, pairs_of
from calibrate.collectives.job import MIN_SAMPLES, Outcome, Plan, Wanted
from calibrate.collectives.payload import Call, payload_of
from calibrate.collectives.points import DTYPE_BYTES, OPS, Point
from calibrate.collectives.samples import CommonClock, Stamps, collective_times_s, exchange_stamps
from calibrate.collectives.world import Rank, Watchdog, World
from moesim.errors import MeasurementError, MoesimError

if TYPE_CHECKING:
    from calibrate.collectives.book import Book
    from calibrate.recorder import Recorder
    from moesim.routing import RoutingSource

__all__ = ["measure_collectives"]

FloatArray = NDArray[np.float64]

_STOP, _SET_CLOCKS = -1, -2
_MAX_SAMPLES = 60
_SAMPLE_S = (0.02, 0.3)
"""Shortest and longest time spent on the samples of one point [s]."""
_DEVICE_SAMPLE_S = 1e-3
"""Back-to-back calls between two events fill about this [s]."""
_MAX_CALLS = 50
_MEMORY_SHARE = 0.5
_BUFFERS = {"all_to_all": 6.0, "send_recv": 3.0}
"""Memory that a message takes, in messages: own buffers, uneven shares and the backend's copies; else 4."""
_SOCKETS = "nccl-sockets-one-gpu"
"""Implementation of rows that prove a code path and are no measurement of a link between GPUs."""


def measure_collectives(wanted: Wanted, me: Rank) -> Outcome:
    """Measure until everything is on file or time is up; every rank of the job calls this.

    Returns
    -------
    What happened, on rank 0; an empty outcome elsewhere.

    Raises
    ------
    MoesimError
        If some rank cannot take part, or data arrive damaged.
    RuntimeError
        From torch, if a rank ends or does not answer.
    """
    watchdog = Watchdog(3 * wanted.timeout_s, me.rank)
    world = World(me, backend=wanted.backend, timeout_s=wanted.timeout_s, one_gpu=wanted.one_gpu)
    problem: MoesimError | None = None
    desk: tuple[Recorder, RoutingSource | None] | None = None
    try:
        world.take_device()
        desk = _opened(wanted) if me.rank == 0 else None
    except MoesimError as error:
        problem = error
    world.agree(problem)
    hosts = world.hosts()
    if wanted.one_gpu and len(set(hosts)) > 1:
        raise MeasurementError("one GPU is on one host", value=len(set(hosts)), place="--one-gpu-sockets")
    plan = _plan(world, wanted, hosts, desk[1] if desk else None)
    handles = world.join(plan.groups), world.join(plan.pairs)
    book = _book(world, wanted, plan, desk[0]) if desk else None
    outcome = _follow(world, wanted, plan, handles, book, watchdog)
    if book is not None:
        book.recorder.close()
    world.close()
    return outcome


def _opened(wanted: Wanted) -> tuple[Recorder, RoutingSource | None]:
    """Rank 0's file, and the routing that uneven splits are drawn from."""
    from calibrate.recorder import Recorder
    from calibrate.run.options import check_file
    from moesim.routing import default_routing, open_trace

    check_file(wanted.out)
    source = None
    if "all_to_all" in wanted.ops:
        source = open_trace(wanted.trace) if wanted.trace else default_routing()
    return Recorder(wanted.out, "collective"), source


def _plan(world: World, wanted: Wanted, hosts: list[str], source: RoutingSource | None) -> Plan:
    """Rank 0 draws the points, so that all have the same and only one needs the trace."""
    groups, pairs = groups_of(hosts), pairs_of(hosts)
    fewest_bytes = -world.largest(-world.free_bytes()) * _MEMORY_SHARE
    points: list[Point] | None = None
    if world.me.rank == 0:
        from calibrate.collectives.plan import plan_points
        from calibrate.collectives.splits import token_shares

        shares = {}
        if source is not None:
            shares = {n: token_shares(source, n, wanted.seed) for n in {group.size for group in groups}}
        points = plan_points(
            wanted.ops, groups, pairs, wanted.sizes, item_bytes=DTYPE_BYTES[wanted.dtype],
            largest_bytes={op: fewest_bytes / _BUFFERS.get(op, 4.0) for op in OPS}, shares=shares, seed=wanted.seed,
        )  # fmt: skip
    return Plan(world.told(points), groups, pairs)


def _book(world: World, wanted: Wanted, plan: Plan, recorder: Recorder) -> Book:
    from calibrate.collectives.book import Book
    from calibrate.run.device import catalog_name

    cuda = world.torch.cuda.is_available()
    name = catalog_name(world.torch.cuda.get_device_name(0)) if cuda else "cpu"
    common = {
        "device": wanted.device or name,
        "implementation": _SOCKETS if wanted.one_gpu else wanted.backend,
        "software": world.software(),
        "dtype": wanted.dtype,
    }
    return Book(wanted, plan, common, recorder)


def _follow(
    world: World, wanted: Wanted, plan: Plan, handles: Any, book: Book | None, watchdog: Watchdog
) -> Outcome:
    """Do what rank 0 says until it says stop."""
    clock = CommonClock()
    sample_s = float(np.clip((wanted.budget_s or math.inf) / max(1, len(plan.points)) / 3, *_SAMPLE_S))
    remaining = book.remaining() if book else iter(())
    while (command := world.command(next(remaining, _STOP))) != _STOP:
        point = plan.points[command]
        watchdog.expect(f"{point.op} of {point.elements} elements")
        if world.command(_SET_CLOCKS if clock.is_due(time.perf_counter()) else 0) == _SET_CLOCKS:
            clock.add(time.perf_counter(), exchange_stamps(world, time.perf_counter))
        stamps = _sampled(world, plan.group(point), point, handles, wanted, sample_s)
        if book is not None and stamps is not None:
            offsets = clock.offsets_s(time.perf_counter())[list(plan.group(point).ranks)]
            time_s, skew_s = collective_times_s(stamps, offsets)
            book.write(point, _one_way_s(stamps) if point.op == "send_recv" else time_s, skew_s)
    return book.outcome if book else Outcome()


def _one_way_s(stamps: Stamps) -> FloatArray:
    """Half of a ping-pong, by the clock of the rank that begins it."""
    own = stamps.device_s[0]
    return np.asarray(0.5 * np.where(np.isnan(own), stamps.end_s[0] - stamps.start_s[0], own))


def _sampled(
    world: World, group: Group, point: Point, handles: Any, wanted: Wanted, sample_s: float
) -> Stamps | None:
    """Time one point on the ranks of its group; the stamps of all of them on rank 0."""
    me, once_s, call = world.me.rank, 0.0, None
    measured, starting = handles[point.op == "send_recv"][point.group]
    if me in group.ranks:
        payload = payload_of(
            point, group, me, dist=world.dist, torch=world.torch, process_group=measured,
            dtype=getattr(world.torch, wanted.dtype), device=world.device,
        )  # fmt: skip
        payload.check(f"{wanted.backend} {point.op} of {point.elements} elements")
        world.synchronize()
        world.dist.barrier(group=starting)
        start_s, end_s, device_s = _timed(world, payload.call, 1)
        once_s, call = end_s - start_s if math.isnan(device_s) else device_s, payload.call
    once_s = world.largest(once_s)
    stamps = np.full((3, int(np.clip(sample_s / once_s, MIN_SAMPLES, _MAX_SAMPLES))), np.nan)
    if call is not None:
        on_device = world.device != "cpu"
        n_calls = math.ceil(_DEVICE_SAMPLE_S / once_s) if on_device and not wanted.one_gpu else 1
        for sample in range(stamps.shape[1]):
            if point.op != "send_recv" or on_device:
                world.dist.barrier(group=starting)
            stamps[:, sample] = _timed(world, call, min(n_calls, _MAX_CALLS))
    found = world.gathered(stamps)
    if found is None:
        return None
    members = found[list(group.ranks)]
    return Stamps(members[:, 0], members[:, 1], members[:, 2])


def _timed(world: World, call: Call, n_calls: int) -> tuple[float, float, float]:
    """Start, end on the host's clock; time of one call on the device's, NaN where the host's counts.

    On a device one call more goes first, untimed: in it the ranks wait for the last one to start.
    """
    if world.device == "cpu":
        start_s = time.perf_counter()
        call()
        return start_s, time.perf_counter(), math.nan
    events = [world.torch.cuda.Event(enable_timing=True) for _ in range(2)]
    start_s = time.perf_counter()
    call()
    events[0].record()
    for _ in range(n_calls):
        call()
    events[1].record()
    world.synchronize()
    return start_s, time.perf_counter(), events[0].elapsed_time(events[1]) * 1e-3 / n_calls
