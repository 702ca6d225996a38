"""Edits in a graph that Inductor compiles for a CPU: of small rows the formula, else the op."""

import functools

import pytest
import torch
from programs import random_program, rows
from tiny import full
from torch._inductor.utils import run_and_get_code

from refusal_kernels.ops import inductor, reference

# in one process with the others that Inductor compiles for: its first graph takes ten seconds
pytestmark = pytest.mark.xdist_group("inductor")
OPS = torch.ops.refusal_kernels
SLOTS = 2
SMALL = 136  # no multiple of a vector's length
LARGE, LARGE_ROUTED = (most // SLOTS + 8 for most in (inductor.MOST, inductor.MOST_ROUTED))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), torch.inference_mode():
        yield
    torch._dynamo.reset()


def compiled(op, dynamic=None):
    return torch.compile(lambda *args: op(*args), fullgraph=True, dynamic=dynamic)


def operands(hidden, dtype=torch.float32, tokens=9):
    bank, params = random_program(hidden, slots=SLOTS)
    route = torch.tensor([0, -1, 1] * (tokens // 3), dtype=torch.int32)
    weight = torch.randn(hidden).to(dtype)
    x, residual = rows(tokens, hidden, dtype), rows(tokens, hidden, dtype)
    return x, residual, weight, 1e-6, bank, params, route, 1.0


@pytest.mark.parametrize(
    ("hidden", "routed", "called"),
    [
        (SMALL, True, False), full(LARGE_ROUTED, True, True),
        full(LARGE_ROUTED, False, False), (LARGE, False, True),
    ],
)  # fmt: skip
def test_only_small_rows_are_inlined(hidden, routed, called):
    x, residual, weight, eps, *program, route, offset = operands(hidden)
    program.append(route if routed else None)
    for op, args in (
        (OPS.add_steer_rms_norm_inference, (x, residual, weight, eps, *program, offset)),
        (OPS.add_steer_inference, (x, residual, *program)),
        (OPS.add_steer_inference, (x, None, *program)),
    ):
        want = op(*args)
        got, (code,) = run_and_get_code(compiled(op), *args)
        assert ("torch.ops.refusal_kernels" in code) == called
        torch.testing.assert_close(got, want)


def test_the_matrix_products_around_it_are_those_of_a_model_without_it():
    """No `addmm`, which copies the residual; one product at most reads strides that are copied."""
    x, residual, weight, eps, bank, params, _, offset = operands(SMALL, tokens=3)
    x, residual = x[:1, None], residual[:1, None]  # one token, [batch, tokens, hidden]
    before, *after = (torch.randn(SMALL, SMALL) for _ in range(4))

    def block(x, residual):
        x = torch.nn.functional.linear(x, before)
        args = weight, eps, bank, params, None, offset
        normed, h = OPS.add_steer_rms_norm_inference(x, residual, *args)
        return h, *(torch.nn.functional.linear(normed, w) for w in after)

    got, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), x, residual)
    torch.testing.assert_close(got, block(x, residual))
    assert code.count("extern_kernels.mm(") == 4 and "addmm(" not in code
    assert code.count(f"(1, {SMALL}), (0, 1)") <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routed", [True, full(False)])
def test_the_formula_is_as_exact_as_eager_pytorch(dtype, routed):
    x, residual, weight, eps, bank, params, route, offset = operands(SMALL, dtype, tokens=96)
    args = weight, eps, bank, params, route if routed else None, offset
    exact = reference.add_steer_rms_norm(x.double(), residual.double(), *args)
    eager = reference.add_steer_rms_norm(x, residual, *args)
    inlined = compiled(OPS.add_steer_rms_norm_inference)(x, residual, *args)
    for got, plain, want in zip(inlined, eager, exact, strict=True):
        assert got.dtype == dtype
        error, allowed = ((t.double() - want).norm() / want.norm() for t in (got, plain))
        assert error <= 1.1 * allowed  # sums in another order: neither is the better one
    if routed:
        left_alone = route < 0
        assert torch.equal(inlined[1][left_alone], (x + residual)[left_alone])


@pytest.mark.parametrize("dtype", [DTYPES[0], *map(full, DTYPES[1:])])
def test_a_row_does_not_depend_on_the_others(dtype):
    x, residual, weight, eps, bank, params, route, offset = operands(SMALL, dtype, tokens=48)
    call = compiled(OPS.add_steer_rms_norm_inference, dynamic=True)

    def some(picked):
        part = x[picked].contiguous(), residual[picked].contiguous()
        return call(*part, weight, eps, bank, params, route[picked].contiguous(), offset)

    whole = some(slice(None))
    spoilt = x.clone()
    spoilt[::2] = float("nan")
    beside = call(spoilt, residual, weight, eps, bank, params, route, offset)
    for picked in (slice(0, 2), slice(5, 47), slice(1, None, 2)):
        for part, all_rows in zip(some(picked), whole, strict=True):
            assert torch.equal(part, all_rows[picked])
    for part, all_rows in zip(beside, whole, strict=True):
        assert torch.equal(part[1::2], all_rows[1::2])


def test_the_dials_stay_live():
    x, residual, _, _, bank, params, route, _ = operands(SMALL)
    call = compiled(OPS.add_steer_inference)
    for change in (lambda: None, lambda: params.mul_(0.5), lambda: route.neg_(), bank.neg_):
        change()
        route.clamp_(min=-1)
        got = call(x, residual, bank, params, route)
        torch.testing.assert_close(got, OPS.add_steer_inference(x, residual, bank, params, route))


def test_a_compilation_before_does_not_keep_inductor_from_knowing(monkeypatch):
    from torch._inductor import decomposition

    ops = OPS.add_steer_inference.default, OPS.add_steer_rms_norm_inference.default
    for op in ops:
        monkeypatch.delitem(decomposition.decompositions, op, raising=False)
    decomposition.fast_random_decomps.cache_clear()
    torch.compile(lambda x: x + 1)(torch.ones(2))  # takes a copy of the table
    once = functools.cache(inductor.register.__wrapped__)
    monkeypatch.setattr(inductor, "register", once)
    x, residual, _, _, *program, _ = operands(SMALL)
    _, (code,) = run_and_get_code(compiled(OPS.add_steer_inference), x, residual, *program)
    assert "torch.ops.refusal_kernels" not in code
