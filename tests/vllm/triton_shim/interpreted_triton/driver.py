"""The driver of the backend: it has nothing to drive. Triton expects one class in this module."""

import torch
from triton.backends import compiler, driver


class InterpretingDriver(driver.DriverBase):
    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("kernels are interpreted: set TRITON_INTERPRET=1")

    def get_current_target(self):
        return compiler.GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("interpreted kernels are not timed")
