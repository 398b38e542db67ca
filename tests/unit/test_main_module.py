"""``python -m moesim`` is the command."""

from __future__ import annotations

import subprocess
import sys


def test_the_module_runs_the_command():
    done = subprocess.run([sys.executable, "-m", "moesim", "list", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("moesim: 'nothing': is no part of the catalog")
    assert done.stdout == ""
