"""CPU rows that are too many for the caches: their outputs are written past them, to the same bits.

Which calls do so is read from this processor's share of cache (`refusal_kernels._C`), so that they
are the right ones on any machine.
"""

import functools
import itertools

import pytest
import torch
from programs import DTYPES, poison, random_program, worst

from refusal_kernels import _C, ops
from refusal_kernels.ops import use_backend

FEW = 16  # rows of a call that stays in L2
same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# the last: rows at the start of a line of the cache, or not
CASES = itertools.product((1, 2), DTYPES, (1, 3), (2048, 2040))


@pytest.mark.parametrize(
    ("threads", "dtype", "slots", "hidden"),
    [pytest.param(*case, marks=pytest.mark.full if n % 7 else ()) for n, case in enumerate(CASES)],
    indirect=["threads"],
)
def test_bits_are_those_of_few_rows(threads, dtype, slots, hidden):
    tokens = threads * (_C.cpu_cache_share() // (4 * hidden * dtype.itemsize) + 9)
    x, residual = torch.randn(2, tokens, hidden).to(dtype)
    x[5, 7], residual[11, 0] = torch.nan, torch.inf
    bank, params = random_program(hidden, slots)
    route = torch.arange(tokens, dtype=torch.int32) % (len(bank) + 1) - 1
    weight = torch.randn(hidden).to(dtype)

    def steered(start, end):
        some = x[start:end], residual[start:end]
        which = route[start:end]
        h = ops.add_steer(*some, bank, params, which)
        return h, *ops.add_steer_rms_norm(*some, weight, 1e-6, bank, params, which)

    poison((x.shape, dtype), (x.shape, dtype))
    whole = steered(0, tokens)
    for start in [*range(0, tokens, 5 * FEW), tokens - FEW]:
        for all_rows, few in zip(whole, steered(start, start + FEW), strict=True):
            same(all_rows[start : start + FEW], few)
    ordinary = torch.ones(tokens, dtype=torch.bool)
    ordinary[[5, 11]] = False
    with use_backend("reference"):
        for all_rows, want in zip(whole, steered(0, tokens), strict=True):
            tolerance = 4 * torch.finfo(dtype).eps * float(want[ordinary].abs().max())
            assert worst(all_rows[ordinary], want[ordinary].double()) <= tolerance
    in_place = residual.clone()
    ops.add_steer_(x, in_place, bank, params, route)
    same(in_place, whole[0])
