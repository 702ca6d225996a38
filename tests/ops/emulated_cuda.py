"""The CUDA kernels as a backend on the CPU, compiled by g++ against `cuda_emulator/`.

The sources of the kernels and their launchers are those that nvcc compiles; only the CUDA runtime
differs. Tests with this backend check the arithmetic, the indices, the launch plans and the
barriers. They do not check speed or what only a GPU does, such as memory ordering and traps.
"""

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths

from refusal_kernels.ops import autograd, registry

NAME = "cuda_emulated"
NAMESPACE = "refusal_kernels_cuda_emulated"
ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"
FLAGS = [
    "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas",
    "-Wno-psabi", f"-I{EMULATOR}", *(f"-I{p}" for p in include_paths()),
    "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-DRK_CUDA_EMULATED={NAMESPACE}",
]  # fmt: skip
# `make sanitize`: what memcheck does on a GPU
SANITIZE = ["-fsanitize=address"] if os.environ.get("REFUSAL_KERNELS_SANITIZE") else []


def build() -> Path:
    """Compile the library unless an unchanged one exists, and return its path."""
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), EMULATOR / "schemas.cpp"]
    folders = ROOT / "csrc", EMULATOR
    inputs = [p for d in folders for p in sorted(d.rglob("*.*")) if p.parent.name != "cpu"]
    digest = hashlib.sha256(" ".join([torch.__version__, *FLAGS, *SANITIZE]).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / f"cuda_emulator-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "library.so"
    with FileLock(folder / "lock"):  # several test processes may start together
        if not library.exists():
            compile_into(folder, sources, library)
    return library


def compile_into(folder: Path, sources: list[Path], library: Path) -> None:
    """Compile `sources` and link them into `library`; their objects stay in `folder`."""
    compiler = os.environ.get("CXX", "c++")

    # the sanitizers are preloaded for this process, not for the compiler
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}

    def run(*arguments: str | Path) -> None:
        command = [compiler, *SANITIZE, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr

    objects = [folder / f"{source.name}.o" for source in sources]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda s, o: run(*FLAGS, "-x", "c++", "-c", s, "-o", o), sources, objects))
    torch_libraries = Path(torch.__file__).parent / "lib"
    partial = folder / "library.partial"
    run("-shared", "-o", partial, *objects, f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu",
        "-lc10")  # fmt: skip
    partial.rename(library)


def register() -> None:
    """Add the backend to the registry, after the CPU's: only `use_backend` reaches it."""
    torch.ops.load_library(str(build()))
    autograd.register(NAMESPACE)
    ops = {op: getattr(getattr(torch.ops, NAMESPACE), op).default for op in autograd.OPS}
    registry.register_backend(NAME, ops, registry.BACKENDS["cpu"].why_not)
