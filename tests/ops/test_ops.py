"""Every op on every backend against float64, on odd shapes, strides and programs."""

import math

import pytest
import torch
from backends import DEVICES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import (
    DTYPES,
    PROGRAMS,
    ablation,
    exact,
    poison,
    program,
    programs_named,
    random_program,
    rows,
    unit,
    worst,
)

from refusal_kernels import ops

CPU_ONLY = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program(backend, name, dtype):
    x, residual = rows(33, 130, dtype), rows(33, 130, dtype)
    r = unit(130)
    bank, params = program((r, r, PROGRAMS[name]))
    want = exact(x, residual, bank, params)
    tolerance = 2 * torch.finfo(dtype).eps * float(want.abs().max())
    assert worst(ops.add_steer(x, residual, bank, params), want) <= tolerance


@pytest.mark.parametrize("slots", [2, 3, 16])
def test_slots_read_the_same_sum(backend, slots):
    # not orthogonal, oblique (u differs from v): a kernel that applied them in turn would differ
    x, residual = rows(9, 70), rows(9, 70)
    bank, params = program(
        *[(torch.randn(70), torch.randn(70), (-0.3, 0.2, 0.1 * j, -1.0, 1.0)) for j in range(slots)]
    )
    want = exact(x, residual, bank, params)
    assert worst(ops.add_steer(x, residual, bank, params), want) <= 1e-5 * float(want.abs().max())
    assert worst(ops.scores(x, bank), x.double() @ bank[0, 0].double().T) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_that_only_fill_up_a_bank_change_nothing(backend, dtype):
    """Programs of several sizes share a bank: a row has the numbers of its program alone."""
    x, residual, weight = rows(7, 300, dtype), rows(7, 300, dtype), torch.randn(300)
    bank, params = random_program(300, slots=2)
    nothing = torch.zeros(2, 2, 3, 300)
    idle = torch.tensor([0.0, 0.0, 0.0, -math.inf, math.inf]).expand(2, 3, 5)
    for taken in (2, 1):
        few = bank[:, :, :taken].contiguous(), params[:, :taken].contiguous()
        many = torch.cat([few[0], nothing], dim=2), torch.cat([few[1], idle], dim=1)
        alone = ops.add_steer_rms_norm(x, residual, weight, 1e-6, *few, return_scores=True)
        filled = ops.add_steer_rms_norm(x, residual, weight, 1e-6, *many, return_scores=True)
        slots = alone[2].shape[1]
        assert (filled[2][:, slots:] == 0).all()
        for a, b in zip(alone[:2], filled[:2], strict=True):
            assert worst(b, a.double()) <= 2 * torch.finfo(dtype).eps * float(a.abs().max())
            if backend == "cpu":  # the other backends add in another order
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("hidden", [40, 2048, 17001])
def test_scores_come_from_the_same_pass(backend, dtype, slots, hidden):
    """What the edit read, before it acted; h and the normed row keep their bits."""
    x, residual, weight = rows(6, hidden, dtype), rows(6, hidden, dtype), torch.randn(hidden)
    bank, params = random_program(hidden, slots=slots)
    route = torch.tensor([0, -1, 1, 0, 1, 1], dtype=torch.int32)
    s = x.double() + residual.double()
    want = torch.einsum("th,tsh->ts", s, bank.double()[route.clamp(min=0).long(), 0])
    want[1] = 0.0
    h, t = ops.add_steer(x, residual, bank, params, route, return_scores=True)
    assert t.dtype == torch.float32 and t.shape == (6, slots)
    assert worst(t, want) <= 1e-5 * float(want.abs().max())
    assert torch.equal(h, ops.add_steer(x, residual, bank, params, route))
    args = (x, residual, weight, 1e-6, bank, params, route)
    normed, h_too, t_too = ops.add_steer_rms_norm(*args, return_scores=True)
    plain = ops.add_steer_rms_norm(*args)
    assert torch.equal(normed, plain[0]) and torch.equal(h_too, plain[1])
    assert worst(t_too, want) <= 1e-5 * float(want.abs().max())
    assert torch.equal(h, h_too)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(
    ("hidden", "tokens"),
    [
        (96, 7), (1000, 9), (2048, 270), (4096, 270),
        (8192, 60), (8192, 200), (12288, 60), (16384, 200),
    ],
)  # fmt: skip
def test_a_row_has_the_same_bits_in_every_batch(backend, hidden, tokens, slots):
    """Alone, among few and among many tokens (which take another launch plan on a GPU)."""
    if DEVICES[backend] == "cpu" and (backend == "triton" or hidden > 4096):
        tokens = min(tokens, 9)  # slow there, and no plan looks at the tokens
    for dtype in (torch.float32, torch.bfloat16):
        row, others = rows(1, hidden, dtype), rows(tokens, hidden, dtype)
        residual, weight = rows(1, hidden, dtype), torch.randn(hidden)
        bank, params = random_program(hidden, slots=slots)

        def run(x, residual, route, bank=bank, params=params, weight=weight):
            outputs = ops.add_steer_rms_norm(
                x, residual, weight, 1e-6, bank, params, route, return_scores=True
            )
            return (*outputs, ops.add_steer(x, residual, bank, params, route))

        alone = run(row, residual, torch.ones(1, dtype=torch.int32))
        route = torch.randint(-1, 2, (tokens + 1,), dtype=torch.int32)
        route[tokens // 2] = 1
        x = torch.cat([others[: tokens // 2], row, others[tokens // 2 :]])
        many = run(x, x.roll(1, 0).index_copy(0, torch.tensor([tokens // 2]), residual), route)
        for one, of_many in zip(alone, many, strict=True):
            assert torch.equal(one[0], of_many[tokens // 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [2048, 8192, 16384])
def test_without_a_route_every_row_takes_program_0(backend, dtype, hidden):
    """The same bits, also where a GPU's block keeps the one program and takes row after row."""
    tokens = 5 if DEVICES[backend] == "cpu" else 300
    x, residual = rows(tokens, hidden, dtype), rows(tokens, hidden, dtype)
    weight = torch.randn(hidden)
    bank, params = random_program(hidden, slots=1)
    args = (x, residual, weight.to(dtype), 1e-6, bank, params)
    route = torch.zeros(tokens, dtype=torch.int32)
    for one, routed in zip(
        (*ops.add_steer_rms_norm(*args), ops.add_steer(x, None, bank, params)),
        (*ops.add_steer_rms_norm(*args, route), ops.add_steer(x, None, bank, params, route)),
        strict=True,
    ):
        assert torch.equal(one, routed)
    want = exact(x, residual, bank[:1], params[:1])
    tolerance = 2 * torch.finfo(dtype).eps * float(want.abs().max())
    off = worst(ops.add_steer_rms_norm(*args)[1], want)
    assert off <= min(tolerance, 0.5 * worst(x + residual, want))  # what is small is seen too


def test_no_slots_is_the_plain_add(backend):
    x, residual = rows(3, 20), rows(3, 20)
    bank, params = torch.empty(1, 2, 0, 20), torch.empty(1, 0, 5)
    assert torch.equal(ops.add_steer(x, residual, bank, params), x + residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_route(backend, dtype):
    x, residual = rows(40, 96, dtype), rows(40, 96, dtype)
    bank, params = programs_named(96, "set", "add", "clamp")
    route = torch.randint(-1, 3, (40,), dtype=torch.int32)
    h = ops.add_steer(x, residual, bank, params, route)
    want = exact(x, residual, bank, params, route)
    assert worst(h, want) <= 2 * torch.finfo(dtype).eps * float(want.abs().max())
    plain = route < 0
    assert plain.any()
    assert torch.equal(h[plain], (x + residual)[plain])
    # a row has the same bits alone, in another batch, and whatever the other rows do
    for i in range(0, 40, 7):
        alone = ops.add_steer(x[i : i + 1], residual[i : i + 1], bank, params, route[i : i + 1])
        assert torch.equal(alone[0], h[i])
    t = ops.scores(x, bank, route)
    assert (t[plain] == 0).all()
    chosen = bank[route.clamp(min=0).long(), 0, 0].double()
    assert worst(t[~plain, 0], (x.double() * chosen).sum(-1)[~plain]) < 1e-4


def test_without_a_residual_x_itself_is_steered(backend):
    x = rows(5, 64)
    _, bank, params = ablation(64)
    assert torch.equal(
        ops.add_steer(x, None, bank, params), ops.add_steer(x, torch.zeros_like(x), bank, params)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_equals_out_of_place(backend, dtype):
    x, residual = rows(21, 77, dtype), rows(21, 77, dtype)
    _, bank, params = ablation(77)
    want, x_before = ops.add_steer(x, residual, bank, params), x.clone()
    returned = ops.add_steer_(x, residual, bank, params)
    assert returned is residual and torch.equal(residual, want) and torch.equal(x, x_before)


VIEWS = {
    "rows apart": lambda t: t[:, 3:80],
    "every other row": lambda t: t[::2, 1:60],
    "transposed": lambda t: t[:77, :20].T,
    "three dims": lambda t: t[:18, 2:].reshape(2, 9, -1)[:, ::3],
    "every other channel": lambda t: t[:, ::2],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_views(backend, view, dtype):
    x, residual = VIEWS[view](rows(90, 101, dtype)), VIEWS[view](rows(90, 101, dtype))
    _, bank, params = ablation(x.shape[-1])
    want = ops.add_steer(x.contiguous(), residual.contiguous(), bank, params)
    assert torch.equal(ops.add_steer(x, residual, bank, params), want)

    whole = rows(90, 101, dtype)
    target = VIEWS[view](whole)
    target.copy_(residual)
    outside = torch.ones_like(whole, dtype=torch.bool)
    VIEWS[view](outside).fill_(False) if view != "three dims" else outside[:18, 2:].fill_(False)
    before = whole.clone()
    if view != "three dims":  # there the reshape made a copy, so the view is not of `whole`
        ops.add_steer_(x, target, bank, params)
        assert torch.equal(target, want)
        assert torch.equal(whole[outside], before[outside]), "wrote outside of the view"


@given(
    tokens=st.integers(0, 5),
    hidden=st.integers(1, 70),
    offset=st.integers(0, 9),
    gap=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    slots=st.integers(1, 5),
    programs=st.integers(1, 3),
    routed=st.booleans(),
    with_residual=st.booleans(),
    data=st.data(),
)
@CPU_ONLY
def test_any_alignment_stride_and_program(
    backend, tokens, hidden, offset, gap, dtype, slots, programs, routed, with_residual, data
):
    """Views that begin anywhere, with sentinels round them and outputs poisoned with NaN."""

    def view():
        whole = torch.full((offset + max(tokens, 1) * (hidden + gap),), 7.0).to(dtype)
        inside = whole[offset:].view(-1, hidden + gap)[:tokens, :hidden]
        return whole, inside.copy_(rows(tokens, hidden, dtype))

    (_, x), (whole, residual) = view(), view()
    other = residual if with_residual else None
    bank = torch.randn(programs, 2, slots, hidden) / math.sqrt(hidden)
    number = st.floats(-2, 2, width=32)
    slot = st.tuples(number, number, number, st.floats(-1, 0, width=32), st.floats(0, 1, width=32))
    params = torch.tensor(data.draw(st.lists(slot, min_size=slots, max_size=slots)))
    params = params.expand(programs, slots, 5).contiguous()
    route = None
    if routed:
        program = st.integers(-1, programs - 1)
        chosen = data.draw(st.lists(program, min_size=tokens, max_size=tokens))
        route = torch.tensor(chosen, dtype=torch.int32)
    want = exact(x, other, bank, params, route)
    tolerance = 3 * torch.finfo(dtype).eps * float(want.abs().max()) + 1e-6 if tokens else 0
    poison(((tokens, hidden), dtype), ((tokens, hidden), dtype))
    h = ops.add_steer(x, other, bank, params, route)
    assert worst(h, want) <= tolerance
    if with_residual:
        ops.add_steer_(x, residual, bank, params, route)
        assert torch.equal(residual, h)
        residual.fill_(7.0)
        assert (whole == 7.0).all(), "wrote outside of the view"


@pytest.mark.full
@pytest.mark.parametrize("name", [n for n, d in DEVICES.items() if n == "cpu" or d == "cuda"])
def test_more_than_two_to_the_31_elements(name):
    # every input row is the same memory; only the output (4 GB) is real
    tokens, hidden = 2**18 + 1, 8192
    with torch.device(DEVICES[name]):
        x = rows(1, hidden, torch.bfloat16).expand(tokens, hidden)
        _, bank, params = ablation(hidden)
    with ops.use_backend(name):
        want = ops.add_steer(x[:1], x[:1], bank, params)
        h = ops.add_steer(x, x, bank, params)
    assert h.numel() > 2**31
    assert torch.equal(h[-1], want[0]) and torch.equal(h[tokens // 2], want[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 111, 1024, 3584, 17001])
def test_rms_norm(backend, dtype, hidden):
    x, weight = rows(13, hidden, dtype), torch.randn(hidden).to(dtype)
    for offset in (0.0, 1.0):
        wide = x.double()
        want = (
            wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (weight.double() + offset)
        )
        got = ops.rms_norm(x, weight, 1e-6, offset)
        assert got.dtype == dtype
        bound = (torch.finfo(dtype).eps + 1e-6) * float(want.abs().max())
        assert worst(got, want) <= bound
    assert ops.rms_norm(x[:0], weight, 1e-6).shape == (0, hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 111, 1024, 9000, 17001])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_steer_rms_norm(backend, dtype, hidden, routed, with_residual):
    x = rows(9, hidden, dtype)
    residual = rows(9, hidden, dtype) if with_residual else None
    weight = torch.randn(hidden).to(dtype)
    bank, params = programs_named(hidden, "set", "clamp")
    route = torch.tensor([0, 1, -1, 0, -1, 1, 1, 0, 0], dtype=torch.int32) if routed else None
    normed, h = ops.add_steer_rms_norm(x, residual, weight, 1e-5, bank, params, route, 1.0)
    assert torch.equal(h, ops.add_steer(x, residual, bank, params, route))
    exact_h = exact(x, residual, bank, params, route)
    want = exact_h / (exact_h.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + 1)
    bound = (torch.finfo(dtype).eps + 2e-6) * float(want.abs().max())
    assert worst(normed, want) <= bound
    alone = ops.add_steer_rms_norm(
        x[4:5], None if residual is None else residual[4:5], weight, 1e-5, bank, params,
        None if route is None else route[4:5], 1.0,
    )  # fmt: skip
    assert torch.equal(alone[0][0], normed[4]) and torch.equal(alone[1][0], h[4])


def test_add_steer_rms_norm_of_views_and_of_nothing(backend):
    for view in ("rows apart", "every other row"):
        x, residual = (VIEWS[view](rows(90, 101)) for _ in range(2))
        weight, (_, bank, params) = torch.randn(x.shape[-1]), ablation(x.shape[-1])
        got = ops.add_steer_rms_norm(x, residual, weight, 1e-6, bank, params)
        want = ops.add_steer_rms_norm(
            x.contiguous(), residual.contiguous(), weight, 1e-6, bank, params
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), view
    normed, h = ops.add_steer_rms_norm(x[:0], None, weight, 1e-6, bank, params)
    assert normed.shape == h.shape == (0, x.shape[-1])
    with pytest.raises(RuntimeError):
        ops.add_steer_rms_norm(x, None, weight[:-1], 1e-6, bank, params)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.update(residual=a["residual"][:, :-1]), "residual"),
        (lambda a: a.update(residual=a["residual"].double()), "residual"),
        (lambda a: a.update(bank=a["bank"].bfloat16()), "bank.*float32"),
        (lambda a: a.update(bank=a["bank"][..., :-1].contiguous()), "bank"),
        (lambda a: a.update(params=a["params"][..., :4].contiguous()), "params"),
        (lambda a: a.update(route=torch.zeros(3, dtype=torch.int32)), "route"),
        (lambda a: a.update(route=torch.zeros(4, dtype=torch.int64)), "route.*int32"),
    ],
)
def test_bad_arguments_raise_and_name_themselves(backend, change, words):
    if backend == "reference":
        pytest.skip("the reference is plain PyTorch: its errors are PyTorch's")
    _, bank, params = ablation(16)
    args = {"x": rows(4, 16), "residual": rows(4, 16), "bank": bank, "params": params}
    change(args)
    with pytest.raises(RuntimeError, match=f"(?s){words}"):
        ops.add_steer(**args)


def test_route_out_of_range_raises_on_the_cpu():
    x = rows(2, 8)
    _, bank, params = ablation(8)
    for bad in (-2, 1):
        with pytest.raises(RuntimeError, match=r"route\[1\] is"):
            ops.add_steer(x, x, bank, params, torch.tensor([0, bad], dtype=torch.int32))


def test_in_place_refuses_what_it_would_spoil():
    _, bank, params = ablation(8)
    with pytest.raises(RuntimeError, match="share memory"):
        ops.add_steer_(rows(4, 8), rows(1, 8).expand(4, 8), bank, params)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.add_steer_(rows(4, 8).requires_grad_(), rows(4, 8), bank, params)
