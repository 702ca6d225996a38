"""Builds the extension `refusal_kernels._C` against libtorch's stable ABI.

Everything else stands in pyproject.toml. The kernels are compiled for several instruction sets and
chosen when it is loaded, so a wheel built here runs on any processor of the same architecture.
"""

import os
import re
import shutil
from pathlib import Path

import torch
from setuptools import setup
from setuptools.extension import Extension
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

TORCH_TARGET = "0x020a000000000000"  # torch 2.10, the oldest whose stable ABI has all we call

# `make sanitize` builds a second copy, never installed, with the compiler's own checkers. At -O3,
# or with every check of an address written out, it would take many minutes to compile.
CHECKERS = (
    "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer "
    "--param=asan-instrumentation-with-call-threshold=0"
)
SANITIZE = CHECKERS.split() if os.environ.get("REFUSAL_KERNELS_SANITIZE") else []

# Python's own flags ask for all debug information, which takes a quarter of the compiler's time;
# the checkers' reports need lines
DEBUG_INFORMATION = "-g1" if SANITIZE else "-g0"

# H100 and A100 by name, and PTX that later GPUs compile for themselves
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0 9.0a 10.0+PTX"


def why_no_cuda() -> str | None:
    """Return the reason why the CUDA kernels cannot be built, or None."""
    if os.environ.get("REFUSAL_KERNELS_CUDA") == "0":
        return "REFUSAL_KERNELS_CUDA=0"
    if SANITIZE:
        return "the checkers are for the C++"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if CUDA_HOME is None or not (shutil.which("nvcc") or Path(CUDA_HOME, "bin", "nvcc").exists()):
        return "nvcc was not found"
    return None


def extension(cuda: bool) -> Extension:
    """Describe the one extension module."""
    suffixes = "cpp|cu" if cuda else "cpp"
    common = [
        "-O3",
        "-std=c++20",  # older releases of PyTorch would choose c++17
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        '-DRK_TORCH_TARGET="2.10"',
        f'-DRK_CUDA_ARCHITECTURES="{ARCHITECTURES if cuda else ""}"',
    ]
    cxx = [
        *common,
        "-fno-math-errno",
        "-ffp-contract=fast",  # a*b+c may become one FMA; nothing else of -ffast-math
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        DEBUG_INFORMATION,
        *SANITIZE,
    ]
    sources = (p for p in Path("csrc").rglob("*") if re.fullmatch(rf".*\.({suffixes})", p.name))
    longest_first = sorted(sources, key=lambda p: (not p.name.startswith(("rows_", "steer_")), p))
    return (CUDAExtension if cuda else CppExtension)(
        "refusal_kernels._C",
        sources=[str(path) for path in longest_first],
        depends=sorted(str(path) for path in Path("csrc").rglob("*.*")),
        py_limited_api=False,  # pybind11 needs the full Python API; torch's side is ABI-stable
        extra_compile_args={"cxx": cxx, "nvcc": [*common, "-DUSE_CUDA"]},
        extra_link_args=SANITIZE,
    )


WHY = why_no_cuda()
if WHY is None:
    os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
    print(f"refusal_kernels: building the CPU and the CUDA kernels ({ARCHITECTURES})")
else:
    print(f"refusal_kernels: building the CPU kernels only ({WHY})")
wanted = os.environ.get("REFUSAL_KERNELS_EXTENSION") != "0"  # `make setup` compiles beside pip
setup(
    ext_modules=[extension(WHY is None)] if wanted else [],
    cmdclass={"build_ext": BuildExtension},
)
