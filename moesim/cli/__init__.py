"""The `moesim` command; the only package that prints."""

from moesim.cli.app import main

__all__ = ["main"]
