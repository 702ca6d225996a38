"""Compile every CUDA kernel for NVIDIA targets; needs nvcc, but no GPU and no CUDA build of torch.

    python tools/compile_cuda.py [--targets 80 90a 100] [--keep build/cuda_gate]

Prints registers and spills for each, and fails where a kernel does not compile or spills, or where
rows of bfloat16 are not moved 16 bytes at a time. Unchanged sources are not compiled again.

Exit status: 0 if all is well, 1 if something fails, 2 if there is no nvcc.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# as setup.py and torch's CUDAExtension have it
FLAGS = [
    *COMMON_NVCC_FLAGS, "-std=c++20", "-O3", "-Xcompiler=-fPIC", "-Xptxas=-v", "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{p}" for p in include_paths()),
]  # fmt: skip
NO_NVCC = (
    "nvcc was not found: not $NVCC, not in $CUDA_HOME/bin, not on PATH, not in this environment "
    '(there, pip install "refusal-kernels[nvcc]")'
)
INSPECTED = "90a"  # the target whose machine code is looked at


class Kernel(NamedTuple):
    """What ptxas reports of one kernel."""

    target: str
    name: str
    registers: int
    local: str  # its stack frame, spill stores and spill loads, if any; none are wanted


def find_nvcc() -> str | None:
    """Return the nvcc to use: the caller's choice, the system's, or the one that pip installed."""
    places = [os.environ.get("NVCC"), "nvcc"]
    if home := os.environ.get("CUDA_HOME"):
        places.insert(1, f"{home}/bin/nvcc")
    try:
        files = metadata.files("nvidia-cuda-nvcc") or []
        places += [str(file.locate()) for file in files if file.name == "nvcc"]
    except metadata.PackageNotFoundError:
        pass
    return next(filter(None, (shutil.which(place) for place in places if place)), None)


def find_cuobjdump(nvcc: str) -> str | None:
    """Return the disassembler beside nvcc, on PATH, or in Triton's wheel, which brings one."""
    places = [str(Path(nvcc).with_name("cuobjdump")), "cuobjdump"]
    if (triton := find_spec("triton")) and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next(filter(None, map(shutil.which, places)), None)


def digest(nvcc: str, source: Path, target: str) -> str:
    """Name everything that the object of a source depends on."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    inherited = [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    what = [version.stdout, torch.__version__, target, *FLAGS, *inherited]
    key = hashlib.sha256("\n".join(what).encode())
    headers = (p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh"))
    for path in [source, *sorted(headers)]:
        key.update(path.read_bytes())
    return key.hexdigest()


def compile_one(nvcc: str, source: Path, target: str, folder: Path) -> str | None:
    """Return what nvcc and ptxas report; if nothing has changed, the report of the last time.

    Returns
    -------
    str or None
        The report; None if the source does not compile, and then the errors are on stderr.
    """
    binary = folder / f"{source.stem}.sm_{target}.o"
    report = binary.with_suffix(".txt")
    key = digest(nvcc, source, target)
    if report.exists() and binary.exists():
        made_of, _, text = report.read_text().partition("\n")
        if made_of == key:
            return text
    report.unlink(missing_ok=True)
    architecture = f"-gencode=arch=compute_{target},code=sm_{target}"
    command = [nvcc, *FLAGS, architecture, "-c", str(source), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{source.name} for sm_{target}:\n{done.stderr}{done.stdout}", file=sys.stderr)
        return None
    text = done.stderr + done.stdout
    report.write_text(f"{key}\n{text}")  # last: with it the object is complete
    return text


def kernels(report: str) -> Iterator[Kernel]:
    """Read the report of ``ptxas -v``: a section per kernel, with the functions that it calls."""
    for section in report.split("Compiling entry function ")[1:]:
        name, target = re.findall(r"'(.+?)'", section)[:2]
        local = re.findall(r"\d+ bytes (?:stack frame|spill stores|spill loads)", section)
        used = re.search(r"Used (\d+) registers", section)
        if not local or not used:
            raise ValueError(f"ptxas says nothing about the registers or the stack of {name}")
        nonzero = (amount for amount in local if not amount.startswith("0 "))
        yield Kernel(target, name, int(used[1]), ", ".join(nonzero))


def readable(names: list[str]) -> dict[str, str]:
    """Demangle names, without namespaces and parameters; without c++filt return them unchanged."""
    if not (tool := shutil.which("c++filt")):
        return dict(zip(names, names, strict=True))
    text = "\n".join(names)
    done = subprocess.run([tool, "-p"], input=text, capture_output=True, text=True, check=True)
    plain = (re.sub(r"\b(?:rk|cuda)::", "", line) for line in done.stdout.splitlines())
    return dict(zip(names, plain, strict=True))


def narrow(cuobjdump: str, binary: Path) -> Iterator[tuple[str, str]]:
    """Yield the steering kernels whose machine code is not as intended, and what is wrong.

    Every pack that is written was read before, so there are at least as many wide loads as stores.
    A load reads global memory (LDG), memory of any kind (LD), or copies into shared memory
    (LDGSTS).
    """
    done = subprocess.run([cuobjdump, "-sass", str(binary)], capture_output=True, text=True)
    sections = done.stdout.split("Function : ")[1:]
    if done.returncode or not sections:
        yield binary.name, f"cuobjdump cannot read it: {done.stderr}"
    for section in sections:
        name = section.split(maxsplit=1)[0]
        ops = ("(?:LDG|LD|LDGSTS)", "STG")
        loads, stores = (len(re.findall(rf"\b{op}\.E\S*\.128\b", section)) for op in ops)
        local = len(re.findall(r"\b(?:LDL|STL)\b", section))
        # rows of any length, and rows that are not aligned, go an element at a time
        wide = loads >= stores > 0 or "steer_long" in name or "Lb0E" in name
        if local or not wide:
            yield name, f"{loads} wide loads, {stores} wide stores, {local} of local memory"


def main() -> int:
    """Compile everything and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["80", "90a", "100"])
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "cuda_gate", metavar="DIR")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print(NO_NVCC, file=sys.stderr)
        return 2
    print(f"nvcc: {nvcc}")
    options.keep.mkdir(parents=True, exist_ok=True)
    sources = sorted((CSRC / "cuda").glob("*.cu"), reverse=True)  # steer_*.cu, the longest, first
    jobs = [(source, target) for source in sources for target in options.targets]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda job: compile_one(nvcc, *job, options.keep), jobs))
    failures = reports.count(None)

    compiled = [kernel for report in reports if report is not None for kernel in kernels(report)]
    names = readable([kernel.name for kernel in compiled])
    for kernel in sorted(compiled):
        if kernel.local or "BF16" in kernel.name:
            verdict = f"SPILLS ({kernel.local})" if kernel.local else "no spills"
            print(f"{kernel.target} {names[kernel.name]}: {kernel.registers} regs, {verdict}")
    spilling = sum(bool(kernel.local) for kernel in compiled)

    binary = options.keep / f"steer_bf16.sm_{INSPECTED}.o"
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        print("cuobjdump was not found: the width of loads and stores is not checked")
    elif INSPECTED in options.targets and not failures:
        wrong = list(narrow(cuobjdump, binary))
        for name, what in wrong:
            print(f"sm_{INSPECTED} {names.get(name, name)}: {what}")
        print(f"sm_{INSPECTED} machine code of the bf16 kernels: {len(wrong)} not as intended")
        failures += len(wrong)
    print(f"{len(compiled)} kernels compiled, {spilling} spill")
    return 1 if failures + spilling else 0


if __name__ == "__main__":
    sys.exit(main())
