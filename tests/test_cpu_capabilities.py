"""The op tests again for every instruction set that this machine runs, not only the best one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from refusal_kernels import _C

OP_TESTS = [Path(__file__).with_name(f"test_{name}.py") for name in ("ops", "cpu_caches")]


def run(capability, *command):
    environment = dict(os.environ, REFUSAL_KERNELS_CPU_CAPABILITY=capability)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=600
    )


def test_what_this_processor_lacks_is_named():
    code = (
        "import torch, refusal_kernels as rk; x = torch.ones(64, 4096);"
        "rk.ops.rms_norm(x, torch.ones(4096), 1e-6)"
    )
    said = run("none such", "-c", code).stderr.strip()
    names = ", ".join(_C.cpu_capabilities())
    assert f"'none such'; this machine runs: {names}" in said.splitlines()[-1]


@pytest.mark.parametrize("capability", ["avx512", "avx2", "baseline"])
def test_ops_with(capability):
    if capability not in _C.cpu_capabilities():
        pytest.skip(f"this processor has no {capability}")
    code = "from refusal_kernels import _C; print(_C.cpu_capability())"
    assert run(capability, "-c", code).stdout.strip() == capability
    done = run(capability, "-m", "pytest", "-q", *OP_TESTS, "-k", "cpu")
    assert done.returncode == 0, done.stdout
    assert "op tests passed per backend: cpu" in done.stdout
