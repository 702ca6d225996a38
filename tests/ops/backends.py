"""Every backend that this machine can run, and where."""

import sys

import emulated_cuda
import torch

from refusal_kernels import _C

GPU = torch.cuda.is_available()
# where a GPU runs the kernels themselves, nothing has to play one
NATIVE = GPU and bool(_C.cuda_architectures())
EMULATED = sys.platform == "linux" and not NATIVE
DEVICES = {"cpu": "cpu", "triton": "cuda" if GPU else "cpu", "reference": "cpu"}
if EMULATED:
    DEVICES[emulated_cuda.NAME] = "cpu"
if NATIVE:
    DEVICES["cuda"] = "cuda"
