"""What the command line does with an input that is refused: one line, exit code 2."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

import typer

from moesim.errors import MoesimError

__all__ = ["guarded"]

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C stops, as shells have it."""


def guarded(command: Callable[[], object]) -> None:
    """Run a command; what it refuses is told in one line on standard error, exit code 2.

    Parameters
    ----------
    command
        Returns an exit code, or None for success.
    """
    try:
        stopped = command()
    except MoesimError as error:
        _refuse(f"moesim: {error}")
    except typer.Abort:
        stopped = INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fix = "; fix: free some space, or write elsewhere" if error.errno == errno.ENOSPC else ""
        _refuse(f"moesim: {where}{error.strerror or error}{fix}")
    except UnicodeError as error:
        _refuse(f"moesim: {error}")
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors: an unknown option, a missing argument
            said = str(error.format_message())
            if not said.startswith("Usage:"):  # that is the help, where no command is given
                said = f"moesim: {' '.join(said.split()).rstrip('.')}; fix: see {_path(error)} --help"
            _refuse(said)
        raise
    if stopped == INTERRUPTED:
        sys.stderr.write("moesim: stopped\n")
    if stopped:
        sys.exit(int(str(stopped)))


def _path(error: Exception) -> str:
    """Command that a usage error is of; the whole one, where the error does not say."""
    context = getattr(error, "ctx", None)
    path = str(context.command_path) if context else "moesim"
    return path if path.split()[1:2] == ["calibrate"] or not path.startswith("moesim") else "moesim"


def _refuse(line: str) -> NoReturn:
    sys.stderr.write(f"{line}\n")
    sys.exit(2)
