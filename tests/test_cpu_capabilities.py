"""The op tests again for every instruction set that this machine runs, not only the best one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OP_TESTS = Path(__file__).parent / "test_ops.py"


def run(capability, *command):
    environment = dict(os.environ, REFUSAL_KERNELS_CPU_CAPABILITY=capability)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=600
    )


def supported():
    said = run("none such", "-c", "from refusal_kernels import _C; _C.cpu_capability()").stderr
    assert "REFUSAL_KERNELS_CPU_CAPABILITY is 'none such'" in said
    return said.rsplit("this machine runs: ", 1)[1].strip().split(", ")


@pytest.mark.parametrize("capability", ["avx512", "avx2", "baseline"])
def test_ops_with(capability):
    if capability not in supported():
        pytest.skip(f"this processor has no {capability}")
    code = "from refusal_kernels import _C; print(_C.cpu_capability())"
    assert run(capability, "-c", code).stdout.strip() == capability
    done = run(capability, "-m", "pytest", "-q", OP_TESTS, "-k", "cpu")
    assert done.returncode == 0, done.stdout
    assert "op tests passed per backend: cpu" in done.stdout
