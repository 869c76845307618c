"""The kernels, with a thread pool in place of XLA's, give sanitizers nothing to say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llmos.drivers.jax.native import build
from llmos.ipc.errors import NotSupported

HARNESS = Path(__file__).with_name("harness.cc")
FLAGS = ("-std=c++17", "-O1", "-march=native", "-pthread")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_no_wrong_address_no_undefined_behaviour_no_race(sanitizer: str, tmp_path: Path) -> None:
    try:
        command = [build.find_compiler(), *FLAGS, f"-fsanitize={sanitizer}", "-isystem", build.headers()]
    except NotSupported as missing:
        pytest.skip(missing.message)
    program = tmp_path / "harness"
    sources = [f"-I{build.SOURCE.parent}", str(HARNESS), "-o", str(program)]
    made = subprocess.run([*command, *sources], capture_output=True, text=True, check=False)
    if "cannot find" in made.stderr:
        pytest.skip(f"no libraries for -fsanitize={sanitizer}")
    assert made.returncode == 0, made.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
