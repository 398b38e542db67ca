"""Damaged recordings are refused, or read; they never end in any other error."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from calibrate.routing.torch_files import load_plain
from moesim.errors import MoesimError
from moesim.routing import RoutingTrace
from moesim.routing.importers import Told, gathered, incoming_routing
from tests.routing_files import MAKERS, TOP_K

N_DAMAGED = 300
CUTS = (b"", b"\x00", b"\xff" * 8, b"{", b"[[", b"-1", b"1e999", b"NaN", b"9" * 25, b'"', b"\x80\x02")


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """The same file with bytes changed, cut out, doubled or put in; most damage near the header."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(max(1, min(len(data), rng.choice((64, 600, len(whole))))))
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.choice((1, 4, 64, len(data)))]
        elif kind == 2:
            data[at:at] = rng.choice(CUTS)
        elif kind == 3:
            data[at : at + 8] = rng.choice(CUTS)
        else:
            data[at:at] = data[at : at + 16]
    return bytes(data)


@pytest.mark.parametrize("name", MAKERS)
def test_damage_is_refused_or_read(tmp_path, name):
    recording = MAKERS[name](tmp_path)
    folder = recording.path if recording.path.is_dir() else recording.path.parent
    files = sorted(file for file in folder.iterdir() if file.is_file())
    whole = {file: file.read_bytes() for file in files}
    rng = random.Random(7)
    told = Told(top_k=TOP_K)
    n_refused = 0
    for _ in range(N_DAMAGED // 3 if name.startswith("sglang_") and name != "sglang_json" else N_DAMAGED):
        victim = rng.choice(files)
        victim.write_bytes(damaged(whole[victim], rng))
        try:
            for format_ in ("auto", recording.format):
                one = incoming_routing(recording.path, format_, told=told, load=load_plain)
                trace = one if isinstance(one, RoutingTrace) else gathered(one)
                trace.check()
        except MoesimError as error:
            n_refused += 1
            assert len(str(error).splitlines()) == 1
            assert str(Path(tmp_path)) in str(error)
        victim.write_bytes(whole[victim])
    assert n_refused > 20
