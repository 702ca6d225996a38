"""Compile every Triton kernel ahead of time for NVIDIA targets; needs no GPU.

    python tools/compile_triton.py [--targets 80 90 100]

Prints registers and spills for each, and fails where a kernel does not compile or spills, or where
a launch could not bind its arguments.
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
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from refusal_kernels.ops import triton_kernels as kernels
from refusal_kernels.ops.triton_ops import MOMENTS, plan

DTYPES = ("fp32", "bf16", "fp16")
POINTERS = {"bank": "fp32", "numbers": "fp32", "scores": "fp32", "route": "i32", "count": "i64"}
POINTERS |= {"mean": "fp64", "m2": "fp64", "partial": "fp64", "order": "i64", "offsets": "i64"}
IN_DTYPE = ("x", "residual", "h", "normed", "weight", "activations")


def steer(
    norm: bool, scores: bool, adjoint: bool, whole: bool, slots: int, residual: bool = True
) -> dict[str, object]:
    """One variant of the kernel that most ops share."""
    return {
        "HAS_RESIDUAL": residual,
        "HAS_ROUTE": True,
        "HAS_NORM": norm,
        "HAS_SCORES": scores,
        "ADJOINT": adjoint,
        "WHOLE": whole,
        "SLOTS": slots,
        **plan(8192, slots),
    }


# The variants of a launch differ in these. A route, a residual and scores only add to what a thread
# holds, so variants without them are compiled for whole rows only.
VARIANTS = {
    "steer_kernel": [
        steer(norm, True, adjoint, whole, slots)
        for norm in (True, False)
        for adjoint in (True, False)
        for whole in (True, False)
        for slots in (1, 16)
    ]
    + [
        steer(norm, adjoint, adjoint, True, 1, residual)
        for norm in (True, False)
        for adjoint in (True, False)
        for residual in (True, False)
        if not (adjoint and residual)  # listed above
    ],
    "scores_kernel": [{"HAS_ROUTE": True, "SLOTS": s, **plan(8192, s)} for s in (1, 16)],
    "rms_norm_kernel": [plan(8192)],
    "moments_kernel": [MOMENTS],
    "merge_moments_kernel": [{"BLOCK": MOMENTS["BLOCK"], "ROWS": MOMENTS["ROWS"]}],
}


def signature(
    name: str, kernel: object, dtype: str, constants: dict[str, object], aligned: bool
) -> tuple[dict[str, str], dict[str, object], dict]:
    """Type every argument of a kernel as a launch would, with its constants and its promises.

    A launch turns integers that are 1 into constants, and promises the compiler which pointers and
    integers are multiples of 16. Here the numbers of slots, programs and splits are 1 unless SLOTS
    says otherwise, and either everything is promised or nothing.
    """
    one = ("slots", "programs", "splits") if constants.get("SLOTS", 1) == 1 else ()
    constants = constants | {a: 1 for a in one if a in kernel.arg_names}
    types, promises = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            types[argument] = "constexpr"
            continue
        if argument in POINTERS:
            types[argument] = f"*{POINTERS[argument]}"
        elif argument in IN_DTYPE:
            types[argument] = f"*{dtype}"
        elif argument == "out":
            types[argument] = "*fp32" if name == "scores_kernel" else f"*{dtype}"
        else:
            types[argument] = "fp32" if argument in ("eps", "weight_offset") else "i32"
        if aligned and types[argument] != "fp32":
            promises[(position,)] = [["tt.divisibility", 16]]
    return types, constants, promises


def bind(kernel: triton.JITFunction) -> None:
    """Bind arguments as a launch does; raise if a launch could not.

    The function that Triton generates for this has local variables, for example `params`, which
    overwrite parameters of the kernel with the same name. Neither the interpreter nor a
    compilation ahead of time calls it.
    """
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    binder(*range(16, 16 + len(kernel.params)))


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
    every = [
        (target, name, variant, aligned, dtype)
        for target in parser.parse_args().targets
        for name, variants in VARIANTS.items()
        for variant in variants
        # without alignment the loads are narrow: more addresses, but fewer other values
        for aligned in ((True, False) if variant.get("SLOTS", 1) == 1 else (True,))
        for dtype in DTYPES
    ]
    for name in VARIANTS:
        bind(getattr(kernels, name))
    for target, name, variant, aligned, dtype in every:
        kernel = getattr(kernels, name)
        constants = {k: v for k, v in variant.items() if k != "num_warps"}
        types, constants, promises = signature(name, kernel, dtype, constants, aligned)
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=promises)
        # sm_90 and later have architecture-specific variants: Triton picks sm_90a
        binary = triton.compile(
            source,
            target=GPUTarget("cuda", target, 32),
            options={"num_warps": variant.get("num_warps", 4)},
        )
        registers, local = spills(binary.asm["cubin"])
        compiled += 1
        failures += local > 0
        if local or dtype == "bf16":
            verdict = f"SPILLS {local} bytes" if local else "no spills"
            how = "aligned" if aligned else "unaligned"
            print(f"sm_{target} {name} {dtype} {how} {variant}: {registers} regs, {verdict}")
    print(f"{compiled} kernels compiled, {failures} spill")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
