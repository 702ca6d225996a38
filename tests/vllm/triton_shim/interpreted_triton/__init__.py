"""Triton's backend "cpu" for tests: kernels run in Triton's interpreter."""

import functools

MARK = "interpreted_triton"


def adapt_interpreter():
    """Make the interpreter accept what vLLM's kernels do: a plugin of vLLM, loaded everywhere."""
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps

    if hasattr(ReduceOps.min_max, MARK):
        return
    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        masked = getattr(InterpreterBuilder, name)
        setattr(InterpreterBuilder, name, _with_bool_mask(masked, position))
    ReduceOps.min_max = _tolerate_nan(ReduceOps.min_max)
    setattr(ReduceOps.min_max, MARK, True)


def _with_bool_mask(method, position):
    """A mask made of scalars is an integer in the interpreter; loads and stores expect a bool."""

    @functools.wraps(method)
    def masked(builder, *args):
        from triton.runtime.interpreter import TensorHandle, tl

        mask = TensorHandle(args[position].data.astype(bool), tl.int1)
        return method(builder, *args[:position], mask, *args[position + 1 :])

    return masked


def _tolerate_nan(min_max):
    """A dummy pass without attention makes rows of NaN, of which NumPy finds no largest index."""

    @functools.wraps(min_max)
    def tolerant(reduction, tensor, val_reduce_op, idx_reduce_op=None):
        import numpy as np

        worst = -np.inf if idx_reduce_op is np.nanargmax else np.inf

        def find(data, **kwargs):
            return idx_reduce_op(np.where(np.isnan(data), worst, data), **kwargs)

        return min_max(reduction, tensor, val_reduce_op, idx_reduce_op and find)

    return tolerant
