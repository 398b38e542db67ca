"""``calibrate run collectives``: the command that torchrun starts on every rank."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from moesim.errors import HardwareError, MeasurementError, MoesimError

if TYPE_CHECKING:
    from calibrate.collectives.job import Wanted
    from calibrate.collectives.world import Rank

__all__ = ["collectives"]


def collectives(
    out: Annotated[
        Path, typer.Option("-o", "--out", help="CSV file that grows row by row; on rank 0's host.")
    ],
    backend: Annotated[
        str | None, typer.Option(help="nccl or gloo; nccl where there is a CUDA GPU, if left out.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Time to spend, as 2m; all points if left out.")] = None,
    sizes: Annotated[
        str, typer.Option(help="Message sizes: a range in powers of two, or a list.")
    ] = "1KiB..1GiB",
    ops: Annotated[str, typer.Option(help="Operators with commas between; all if left out.")] = "",
    trace: Annotated[
        str | None, typer.Option(help="Routing of uneven splits: a name of the catalog or a file.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or uint8.")] = "bfloat16",
    device: Annotated[
        str | None, typer.Option(help="Device name in the table; the GPU's own if left out.")
    ] = None,
    timeout: Annotated[str, typer.Option(help="Longest wait for a rank that does not answer.")] = "2m",
    one_gpu_sockets: Annotated[
        bool,
        typer.Option(
            help="All ranks on one GPU, NCCL over loopback: proves the code path, measures no link."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of routing and order.")] = 0,
) -> None:
    """Measure collectives between the ranks that torchrun started (see docs/calibration.md)."""
    from calibrate.collectives.points import DTYPE_BYTES, OPS, parse_sizes
    from calibrate.collectives.world import rank_of
    from calibrate.run.options import parse_budget

    me = rank_of(os.environ)
    try:
        _check_torch()
        from calibrate.collectives.job import Wanted

        wanted = Wanted(
            out,
            _backend(backend, one_gpu_sockets),
            parse_sizes(sizes),
            ops=_chosen(ops, OPS, "--ops") or OPS,
            dtype=(_chosen(dtype, tuple(DTYPE_BYTES), "--dtype") or ("bfloat16",))[0],
            budget_s=parse_budget(budget) if budget else None,
            timeout_s=parse_budget(timeout, "--timeout"),
            trace=trace,
            device=device,
            one_gpu=one_gpu_sockets,
            seed=seed,
        )
    except MoesimError:
        if me.rank == 0:
            raise
        _end("", 2)  # every rank refuses the same line
    _run(wanted, me)


def _run(wanted: Wanted, me: Rank) -> None:
    from calibrate.collectives.run import measure_collectives
    from calibrate.collectives.world import RefusedError, first_line

    try:
        outcome = measure_collectives(wanted, me)
    except RefusedError as error:  # every rank knows, and one says so
        _end(str(error) if me.rank == 0 else "", 2)
    except MoesimError as error:
        _end(f"rank {me.rank}: {error}", 2)
    except (RuntimeError, OSError) as error:
        kept = f"rows so far are in {wanted.out}, the same command resumes"
        _end(f"rank {me.rank} ended: {first_line(error)}; {kept}", 1)
    if me.rank == 0:
        left = f"; {outcome.n_left} left for want of time: the same command goes on" if outcome.n_left else ""
        before = f", {outcome.n_before} were there" if outcome.n_before else ""
        typer.echo(f"{wanted.out}: {outcome.n_written} points{before}{left}")


def _end(said: str, code: int) -> NoReturn:
    """End without destructors: those of a broken group may wait for ranks that are gone."""
    if said:
        sys.stderr.write(f"moesim: {said}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    if not said:
        time.sleep(_FIRST_S)
    os._exit(code)


_FIRST_S = 2.0
"""Lead of the rank that says why: torchrun ends all others as soon as one has ended."""


def _check_torch() -> None:
    try:
        import torch.distributed
    except ModuleNotFoundError:
        fix = 'pip install "moesim[calibrate]"'
        raise HardwareError("measuring collectives needs torch, which is not installed", fix=fix) from None
    if not torch.distributed.is_available():
        raise HardwareError("this build of torch has no torch.distributed", fix="install another build")


def _backend(name: str | None, one_gpu: bool) -> str:
    import torch

    if name is None:
        return "nccl" if one_gpu or torch.cuda.is_available() else "gloo"
    if name not in ("nccl", "gloo"):
        raise MeasurementError("is no backend", value=name, fix="use nccl or gloo", place="--backend")
    if one_gpu and name == "gloo":
        raise MeasurementError("is about NCCL", fix="leave --backend out", place="--one-gpu-sockets")
    return name


def _chosen(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    unknown = [word for word in words if word not in known]
    if unknown:
        raise MeasurementError("is not known here", value=unknown[0], fix=", ".join(known), place=option)
    return words
