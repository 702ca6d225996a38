"""What a captured CUDA graph does, on a CPU: a graph replays with the tensors of its capture.

Between two replays whatever runs outside may write into those tensors; what it hands over as
another tensor is not seen.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

replays: list["CompiledGraph"] = []  # one entry for each replay


def backend(module, examples):
    """Compile a region of vLLM's model as on a CPU: a ``compilation_config["backend"]``."""
    from torch._inductor.compile_fx import compile_fx

    return CompiledGraph(compile_fx(module, examples))


class CompiledGraph:
    """A compiled region: a call of a shape that came before is a replay.

    As for a PIECEWISE graph, what enters is copied to where it was captured.
    """

    def __init__(self, run):
        self.run = run
        self.captured = {}

    @property
    def addresses(self):
        """Where the tensors of all captures are."""
        captured = [tensor for args, _ in self.captured.values() for tensor in _tensors(args)]
        return {tensor.data_ptr() for tensor in captured}

    def __call__(self, *args):
        shape = tuple(a.shape if isinstance(a, torch.Tensor) else a for a in args)
        if shape not in self.captured:
            outputs = self.run(*args)
            self.captured[shape] = args, outputs
            return outputs
        captured, outputs = self.captured[shape]
        for given, there in zip(args, captured, strict=True):
            if isinstance(given, torch.Tensor) and given.data_ptr() != there.data_ptr():
                there.copy_(given)
        for new, there in zip(self.run(*captured), outputs, strict=True):
            there.copy_(new)
        replays.append(self)
        return outputs


class Recorder(TorchDispatchMode):
    """Records every operation with its tensors, as the capture of a FULL graph does."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, outputs))
        return outputs

    def replay(self):
        """Run all operations again, on the same tensors and into the same tensors."""
        for operation, args, kwargs, outputs in self.operations:
            again = operation(*args, **kwargs)
            for new, there in zip(_tensors(again), _tensors(outputs), strict=True):
                if new.data_ptr() != there.data_ptr():  # neither a view nor written in place
                    there.copy_(new)


def _tensors(outputs):
    return [t for t in tree_flatten(outputs)[0] if isinstance(t, torch.Tensor)]
