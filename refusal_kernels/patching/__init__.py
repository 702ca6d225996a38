"""Patching Hugging Face models: the residual adds of the decoder layers become steered adds."""

from refusal_kernels.patching.attach import patch
from refusal_kernels.patching.handle import PatchHandle, PatchReport, unpatch

__all__ = ["PatchHandle", "PatchReport", "patch", "unpatch"]
