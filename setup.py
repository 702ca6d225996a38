"""Builds the extension `refusal_kernels._C` against libtorch's stable ABI.

Everything else stands in pyproject.toml. The kernels are compiled for several instruction sets and
chosen at load, so a wheel built here runs on any processor of the same architecture.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_TARGET = "0x020a000000000000"  # torch 2.10: the oldest release whose stable ABI has it all

# `make sanitize` builds a second copy, never installed, with the compiler's own checkers
SANITIZE = (
    ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    if os.environ.get("REFUSAL_KERNELS_SANITIZE")
    else []
)


def extension() -> CppExtension:
    """Describe the one extension module."""
    return CppExtension(
        "refusal_kernels._C",
        sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").rglob("*.[hi]*")),
        py_limited_api=False,  # pybind11 needs the full Python API; torch's side is ABI-stable
        extra_compile_args=[
            "-O3",
            "-fno-math-errno",
            "-ffp-contract=fast",  # a*b+c may become one FMA; nothing else of -ffast-math
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            '-DRK_TORCH_TARGET="2.10"',
            *SANITIZE,
        ],
        extra_link_args=SANITIZE,
    )


WHY = "this version has no CUDA kernels" if shutil.which("nvcc") else "nvcc was not found"
print(f"refusal_kernels: building the CPU kernels only ({WHY})")
setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
