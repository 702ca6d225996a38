"""What a result depends on beside the code: versions and the device."""

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from refusal_kernels import _C

PACKAGES = ("refusal-kernels", "torch", "transformers", "triton", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    if commit := _commit():
        installed["commit"] = commit
    return installed


def _commit() -> str | None:
    """Return the commit of the checkout that this package runs from, if it runs from one.

    "-dirty" where a tracked file differs, or the package has a new one; recorded results do not
    count, or a run that writes its own could not be resumed. A copy without ``.git``, on another
    machine say, is told by ``REFUSAL_KERNELS_COMMIT``.
    """
    if told := os.environ.get("REFUSAL_KERNELS_COMMIT"):
        return told
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    code = (".", ":(exclude)benchmarks/results")
    try:
        commit = _git(root, "describe", "--always", "--abbrev=12")
        differs = _git(root, "diff", "--name-only", "HEAD", "--", *code)
        new = ("ls-files", "--others", "--exclude-standard", "--", "refusal_kernels", "csrc")
        differs = differs or _git(root, *new)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if differs else commit


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def describe_device(device: str | torch.device | Any = "cpu") -> str:
    """Return the GPU's name, or the processor's with cores, threads and instruction set."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{_C.cpu_capability()} kernels"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def clock_mhz(device: str) -> float | None:
    """Return the clock at this moment, the mean over all cores; None where nothing tells it."""
    with suppress(Exception):
        if device.startswith("cuda"):
            return float(torch.cuda.clock_rate())
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
        return round(sum(clocks) / len(clocks), 1)
    return None
