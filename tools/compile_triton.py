"""Compile every Triton kernel ahead of time for NVIDIA targets; needs no GPU.

    python tools/compile_triton.py [--targets 80 90 100]

Prints registers and spills for each, and fails where a kernel does not compile or spills.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from refusal_kernels.ops import triton_kernels as kernels
from refusal_kernels.ops.triton import plan

DTYPES = ("fp32", "bf16", "fp16")
POINTERS = {"bank": "fp32", "params": "fp32", "route": "i32", "count": "i64", "mean": "fp64"}
POINTERS |= {"m2": "fp64", "order": "i64", "offsets": "i64"}
# every variant that a launch can ask for differs in these
VARIANTS = {
    "steer_kernel": [
        {
            "HAS_RESIDUAL": residual,
            "HAS_ROUTE": True,
            "HAS_NORM": norm,
            "WHOLE": whole,
            "SLOTS": slots,
            **plan(8192, slots),
        }
        for residual in (True, False)
        for norm in (True, False)
        for whole in (True, False)
        for slots in (1, 16)
    ],
    "scores_kernel": [{"HAS_ROUTE": True, "SLOTS": s, **plan(8192, s)} for s in (1, 16)],
    "rms_norm_kernel": [plan(8192)],
    "moments_kernel": [{"BLOCK": 128, "SPLIT": 32}],
}


def signature(name: str, kernel: object, dtype: str, constants: dict[str, object]) -> dict:
    """Triton's type of every argument of a kernel."""
    types = {}
    for argument in kernel.arg_names:
        if argument in constants:
            types[argument] = "constexpr"
        elif argument in POINTERS:
            types[argument] = f"*{POINTERS[argument]}"
        elif argument in ("x", "residual", "h", "normed", "weight", "activations"):
            types[argument] = f"*{dtype}"
        elif argument == "out":
            types[argument] = "*fp32" if name == "scores_kernel" else f"*{dtype}"
        else:
            types[argument] = "fp32" if argument in ("eps", "weight_offset") else "i32"
    return types


def spills(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory, as ``cuobjdump`` reads them."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"LOCAL:(\d+)", text)[1])


def main() -> int:
    """Compile everything and return the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100])
    failures = compiled = 0
    for target in parser.parse_args().targets:
        for name, variants in VARIANTS.items():
            kernel = getattr(kernels, name)
            for variant in variants:
                constants = {k: v for k, v in variant.items() if k != "num_warps"}
                options = {"num_warps": variant.get("num_warps", 4)}
                for dtype in DTYPES:
                    source = ASTSource(
                        fn=kernel,
                        signature=signature(name, kernel, dtype, constants),
                        constexprs=constants,
                    )
                    # sm_90 and later have architecture-specific variants: Triton picks sm_90a
                    binary = triton.compile(
                        source, target=GPUTarget("cuda", target, 32), options=options
                    )
                    registers, local = spills(binary.asm["cubin"])
                    compiled += 1
                    if local:
                        failures += 1
                    if local or dtype == "bf16":
                        verdict = f"SPILLS {local} bytes" if local else "no spills"
                        print(f"sm_{target} {name} {dtype} {variant}: {registers} regs, {verdict}")
    print(f"{compiled} kernels compiled, {failures} spill")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
