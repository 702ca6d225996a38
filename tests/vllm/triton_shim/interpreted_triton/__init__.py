"""Triton's backend "cpu" for tests: kernels run in Triton's interpreter."""

import functools

MARK = "interpreted_triton"


def adapt_interpreter():
    """Make the interpreter accept what vLLM's kernels do: a plugin of vLLM, loaded everywhere."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps

    if hasattr(ReduceOps.min_max, MARK):
        return
    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        masked = getattr(InterpreterBuilder, name)
        setattr(InterpreterBuilder, name, _with_bool_mask(masked, position))
    interpreter._patch_lang_core = _with_loop_index(interpreter._patch_lang_core)
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


class LoopIndex(int):
    """What counts a loop is a number in the interpreter; on a device it is a tensor with a type."""

    def to(self, dtype):
        return self


def _with_loop_index(patch_lang_core):
    @functools.wraps(patch_lang_core)
    def patch(lang, scope):
        patch_lang_core(lang, scope)
        numbers = lang.range
        scope.set_attr(lang, "range", lambda *a, **k: map(LoopIndex, numbers(*a, **k)))

    return patch


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
