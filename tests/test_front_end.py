"""Every kernel compiles for the arguments that a GPU would launch it with, ones and strides past 32 bits among them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent


def test_launches_pass_tritons_front_end() -> None:
    """On Hopper, where descriptors are among them; its Gluon kernels are in test_hopper_launch.py."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.front_end", "sm_90"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    files = [path for path in (ROOT / "kernels").rglob("*.py") if path.parent.name != "hopper"]
    kernels = {name for path in files for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert json.loads(done.stdout).keys() == kernels
