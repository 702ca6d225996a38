"""The op tests again for every instruction set that this machine runs, not only the best one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from refusal_kernels import _C

CAPABILITIES = ["avx512_bf16", "avx512", "avx2", "baseline"]
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


@pytest.mark.full
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ops_with(capability):
    if capability not in _C.cpu_capabilities():
        pytest.skip(f"this processor has no {capability}")
    code = "from refusal_kernels import _C; print(_C.cpu_capability())"
    assert run(capability, "-c", code).stdout.strip() == capability
    done = run(capability, "-m", "pytest", "-q", *OP_TESTS, "-k", "cpu", "-m", "not full")
    assert done.returncode == 0, done.stdout
    assert "op tests passed per backend: cpu" in done.stdout


@pytest.mark.full
def test_bfloat16_has_the_same_bits_by_instruction_as_without():
    """Every bfloat16, added to another: denormals, ties, overflow and NaN of either sign."""
    code = """
import hashlib, torch, refusal_kernels as rk
torch.manual_seed(0)
every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
x = torch.stack([every.view(16, 4096), every.flip(0).view(16, 4096)]).flatten(0, 1)
residual = torch.stack([torch.zeros_like(every), every[torch.randperm(65536)]]).view(32, 4096)
bank, params = torch.zeros(1, 2, 1, 4096), torch.zeros(1, 1, 5)
plain = torch.full([32], -1, dtype=torch.int32)
tiny = (torch.rand(32, 4096) * 1e-38).bfloat16()
weight = torch.rand(4096).bfloat16()
outputs = [
    rk.ops.add_steer(x, residual, bank, params, plain),
    *rk.ops.add_steer_rms_norm(x, residual, weight, 1e-6, bank, params, plain),
    rk.ops.rms_norm(tiny, weight, 1.0),
]
assert torch.equal(outputs[0][:16].isnan(), x[:16].isnan())
same = (outputs[0][:16] == x[:16]) | x[:16].isnan()
assert same.all(), "x + 0 is not x"
assert (outputs[-1] != 0).any(), "denormals are gone"
for output in outputs:
    print(hashlib.sha256(output.view(torch.uint8).numpy().tobytes()).hexdigest())
"""
    runs = {name: run(name, "-c", code) for name in CAPABILITIES if name in _C.cpu_capabilities()}
    for name, done in runs.items():
        assert done.returncode == 0, (name, done.stderr)
    if "avx512_bf16" in runs:
        assert runs["avx512_bf16"].stdout == runs["avx512"].stdout
    # the plain add has one order of operations in every set
    assert len({done.stdout.splitlines()[0] for done in runs.values()}) == 1
