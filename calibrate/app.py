"""`moesim calibrate`: measure kernels and links, fit a profile to what was measured, show its error.

Nothing here imports pandas, torch or triton before a command needs it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import show
from moesim.cli.guard import guarded
from moesim.errors import HardwareError, MeasurementError, ProfileError
from moesim.hardware import Gpu, Profile, load_gpu, open_profile
from moesim.report import fit_table, unpredicted_table, validation_table

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["app", "main"]

app = typer.Typer(
    name="calibrate",
    help="Measure kernels and links, fit a profile to what was measured, show its error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Files = Annotated[
    list[str], typer.Argument(metavar="FILES...", help="Measured tables, CSV or Parquet, one kind a file.")
]
GpuFile = Annotated[
    str | None,
    typer.Option("--gpu", metavar="FILE", help="Datasheet of a GPU that the catalog does not have (YAML)."),
]


@app.command()
def fit(
    files: Files,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="GPU whose rows are fitted: a name of `moesim list gpus`.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PROFILE", help="Profile to write (.yaml).")
    ],
    base: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROFILE",
            help="Profile to start from: a device of the catalog, or a YAML file; repeatable for parts of one.",
        ),
    ] = None,
    gpu: GpuFile = None,
    source: Annotated[str, typer.Option(help="Who measured, for the profile's provenance.")] = "",
    json: Json = False,
) -> None:
    """Fit a profile to measured tables, with its error on what was held out."""
    started = time.perf_counter()
    _check_output(output, (".yaml", ".yml"))
    chip = _gpu(device, gpu)
    start = _base(base or [])
    with _needs_extra():
        from calibrate.fit.common import write_fragment
        from calibrate.fit.registry import fit_tables, refitted
        from calibrate.tables import read_tables
    notes: list[str] = []
    with _progress("fitting", quiet=json) as say:

        def note(line: str) -> None:
            notes.append(line)
            say(line)

        tables = read_tables(files, gpu=chip, note=note)
        families = fit_tables(tables, gpu=chip, base=start, note=note, names=[device])
        new = refitted(families, start, chip)
        families = [_sourced(one, source) if mine else one for one, mine in zip(families, new, strict=True)]
        write_fragment(output, chip.name, families)
    briefs = [_brief(one, mine) for one, mine in zip(families, new, strict=True)]
    told = {
        "profile": str(output), "device": chip.name, "families": briefs, "notes": notes,
        "elapsed_s": time.perf_counter() - started,
    }  # fmt: skip
    if json:
        show.json_text(told)
        return
    last = f"{output}: {len(families)} families in {told['elapsed_s']:.0f} s"
    if kept := [one for one in briefs if not one["refitted"]]:
        carried = sum(one["kind"] == "carried-over" for one in kept)
        last = f"{len(kept)} families kept from {' '.join(base or [])} ({carried} carried over)\n{last}"
    show.tables(*([fit_table(told)] if any(new) else []), last=last)


@app.command()
def validate(
    files: Files,
    profile: Annotated[
        str, typer.Option(metavar="PROFILE", help="Profile: a device of the catalog, or a YAML file.")
    ],
    gpu: GpuFile = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Only rows that were marked as held out when measured.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE", help="Write a page of predicted against measured.")
    ] = None,
    json: Json = False,
) -> None:
    """Compare a profile with measured tables: error of every operation, implementation and format."""
    if html is not None:
        _check_output(html, (".html", ".htm"))
    told_profile = open_profile(profile)
    chip = _gpu(told_profile.device, gpu)
    with _needs_extra():
        from calibrate.fit.registry import predict_rows
        from calibrate.tables import read_tables
        from calibrate.validate.kernels import summary, validate_tables, write_page
    with _progress("predicting", quiet=json) as say:
        predict = partial(predict_rows, gpu=chip, profile=told_profile)
        tables = read_tables(files, gpu=chip, note=say)
        found = validate_tables(tables, told_profile, predict, held_out_only=held_out)
    told = summary(found, told_profile, profile)
    if html is not None:
        told["html"] = str(write_page(html, found, told, told_profile))
    if json:
        show.json_text(told)
        return
    last = f"{told['n_predicted']:,} of {told['n_rows']:,} rows predicted."
    if html is not None:
        last += f"\nPage: {html}"
    known = [validation_table(told)] if told["groups"] else []
    lacking = [unpredicted_table(told)] if told["unpredicted"] else []
    show.tables(*known, *lacking, last=last)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def run(context: typer.Context) -> None:
    """Measure kernels, transfers and collectives on this machine: kernels | transfers | collectives | all."""
    with _needs_extra():
        commands: typer.Typer = import_module("calibrate.run.command").app
        code = commands(args=context.args, prog_name=context.command_path, standalone_mode=False)
    if code:
        raise typer.Exit(int(code))


def main() -> None:
    """Run ``python -m calibrate``; what is refused is told in one line, exit code 2."""
    guarded(lambda: app(prog_name="python -m calibrate", standalone_mode=False))


# ---------------------------------------------------------------- arguments


@contextmanager
def _needs_extra() -> Iterator[None]:
    """Say what to install where a package that only calibration needs is absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("pandas", "pyarrow", "torch", "triton"):
            raise
        raise MeasurementError(
            f"calibration needs {package}, which is not installed", fix="pip install 'moesim[calibrate]'"
        ) from error


def _gpu(device: str, file: str | None) -> Gpu:
    """Datasheet of a device: from the catalog, or from a file that must be of this device."""
    if file is None:
        try:
            return load_gpu(device)
        except HardwareError as error:
            if error.place is not None:  # a file, which says itself what it lacks
                raise
            fix = f"{error.fix}; or describe it in a file like the catalog's, --gpu FILE"
            raise HardwareError(error.rule, value=error.value, fix=fix) from None
    found = load_gpu(file)
    if found.name != device:
        raise MeasurementError(
            f"describes {found.name}, not {device}", place=file, fix=f"set its name to {device}"
        )
    return found


def _base(names: Sequence[str]) -> Profile | None:
    """Parts of a profile as one."""
    parts = [open_profile(name) for name in names]
    if not parts:
        return None
    for name, part in zip(names, parts, strict=True):
        if part.device != parts[0].device:
            raise ProfileError(
                f"is a profile of {part.device}, and {names[0]} of {parts[0].device}",
                place="--base",
                value=name,
                fix="parts of one profile only",
            )
    return Profile(device=parts[0].device, families=tuple(one for part in parts for one in part.families))


def _check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a file that cannot be written, before any work is done for it."""
    place = "-o" if ".yaml" in suffixes else "--html"
    if path.is_dir():
        raise MeasurementError("is a folder", value=str(path), place=place, fix="add the name of a file")
    if path.suffix.lower() not in suffixes:
        raise MeasurementError(
            f"must end in {suffixes[0]}", value=str(path), place=place, fix=f"{path.name}{suffixes[0]}"
        )
    if not path.resolve().parent.is_dir():
        raise MeasurementError(
            "its folder does not exist", value=str(path), place=place, fix="make the folder"
        )


# ---------------------------------------------------------------- output


@contextmanager
def _progress(what: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Spinner with the newest line on standard error where somebody watches, plain lines elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda line: None if quiet else print(f"{what}: {line}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.markup import escape

    console: Console = Console(stderr=True)
    with console.status(what) as status:

        def say(line: str) -> None:
            console.print(f"[dim]{escape(line)}[/dim]", highlight=False)
            status.update(f"{what}: {escape(line)}")

        yield say


def _sourced(family: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A family whose provenance says who measured, where it was fitted here."""
    origin = family["provenance"]
    if not source or origin["kind"] not in ("fitted", "measured"):
        return dict(family)
    return {**family, "provenance": {**origin, "data": f"{source}: {origin['data']}"}}


def _brief(family: Mapping[str, Any], is_refitted: bool) -> dict[str, Any]:
    from calibrate.fit.doubts import doubts

    origin = family["provenance"]
    return {
        "op": family["op"], "implementation": family["implementation"], "dtype": family["dtype"],
        "kind": origin["kind"], "n_points": origin.get("n_points", 0), "held_out": family.get("held_out"),
        "refitted": is_refitted, "doubts": doubts(family) if is_refitted else [],
    }  # fmt: skip
