"""The project's scripts, run as users run them."""

import os
import subprocess
import sys

from conftest import ROOT


def run(script, *arguments, launcher=(), environment=None):
    """What a script prints that ends well; charts are drawn without a screen."""
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    own = {**(os.environ if environment is None else environment), "MPLBACKEND": "Agg"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=own)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
