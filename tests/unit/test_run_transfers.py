"""Copies over streams: all begin before any is waited for; products run beside them. Streams are fakes here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from calibrate.run.device import CpuDevice
from calibrate.run.points import Point
from calibrate.run.protocol import WrongResultError
from calibrate.run.transfers import TransferCase


class FakeStream:
    events: list[tuple[str, int, int]]
    n_streams = 0

    def __init__(self) -> None:
        FakeStream.n_streams += 1
        self.number = FakeStream.n_streams

    def wait_stream(self, other: FakeStream) -> None:
        FakeStream.events.append(("wait", self.number, other.number))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    FakeStream.events, FakeStream.n_streams = [], 0
    current = FakeStream()

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        FakeStream.events.append(("on", stream.number, 0))
        yield

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr("calibrate.run.transfers._BUSY_SIZE", 64)
    return current


def case(**columns: Any) -> TransferCase:
    row = {"op": "h2d", "implementation": "torch:copy", "dtype": "any", "n_bytes": 2**16, "pinned": 0, "n_streams": 4,
           "busy": 0, **columns}  # fmt: skip
    return TransferCase(Point("transfer", "test", row), CpuDevice())


@pytest.mark.parametrize("op", ["h2d", "d2h", "d2d"])
@pytest.mark.parametrize("n_streams", [1, 2, 8])
def test_every_byte_arrives(streams: FakeStream, op: str, n_streams: int) -> None:
    copied = case(op=op, n_streams=n_streams)
    copied.refresh(0, 1)
    copied.check()
    assert copied.n_kernels == n_streams


def test_streams_start_together_and_are_waited_for_together(streams: FakeStream) -> None:
    copied = case(n_streams=3)
    FakeStream.events.clear()
    copied.call(0)
    waits = [event for event in FakeStream.events if event[0] == "wait"]
    begun, ended = waits[:3], waits[3:]
    assert {(who, whom) for _, who, whom in begun} == {(n, streams.number) for _, n, _ in begun}
    assert {(who, whom) for _, who, whom in ended} == {(streams.number, n) for _, n, _ in begun}


def test_products_run_on_a_stream_of_their_own_before_a_busy_copy(streams: FakeStream) -> None:
    idle, busy = case(busy=0), case(busy=1)
    for one, expected in ((idle, 0), (busy, busy._n_products)):
        made: list[int] = []
        one._torch = Counting(made)
        one.refresh(0, 1)
        assert len(made) == expected
    assert busy._n_products >= 3


@pytest.mark.parametrize("op", ["h2d", "d2h", "d2d"])
def test_random_bytes_are_made_on_the_device_and_for_the_source_only(
    streams: FakeStream, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor would need a second for them; where each buffer is told by how it is asked for."""
    asked: dict[int, str] = {}
    filled: list[str] = []
    empty = torch.empty

    def made(*size: int, **how: Any) -> torch.Tensor:
        found = empty(*size, **how)
        asked[found.data_ptr()] = "device" if "device" in how else "host"
        return found

    def random_(self: torch.Tensor, *bounds: int) -> torch.Tensor:
        filled.append(asked[self.data_ptr()])
        return self.fill_(7)

    monkeypatch.setattr(torch, "empty", made)
    monkeypatch.setattr(torch.Tensor, "random_", random_)
    copied = case(op=op)
    assert filled == ["device"] * copied.n_sets
    assert all((one == 7).all() for one in copied._from)
    copied._to[0].copy_(copied._from[0])
    copied.call = lambda index: None  # type: ignore[method-assign]
    with pytest.raises(WrongResultError):  # bytes left from before are no copy
        copied.check()


class Counting:
    """torch, with products counted."""

    def __init__(self, made: list[int]) -> None:
        self._made = made
        self.cuda = torch.cuda

    def mm(self, x: torch.Tensor, y: torch.Tensor, *, out: torch.Tensor) -> None:
        self._made.append(1)


def test_a_copy_that_loses_bytes_is_refused(streams: FakeStream) -> None:
    copied = case()
    copied.call = lambda index: None  # type: ignore[method-assign]
    with pytest.raises(WrongResultError):
        copied.check()
