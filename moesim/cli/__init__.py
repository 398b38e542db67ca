"""The `moesim` command; the only package that prints."""

import os

__all__ = ["main"]


def main() -> None:
    """Run the command line; an input that is refused is told in one line, exit code 2."""
    # nothing here is large linear algebra: NumPy's threads would only cost their start
    for library in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(library, "1")
    from moesim.cli.app import main as run

    run()
