"""Every op on every backend against float64, on odd shapes, strides and values."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refusal_kernels import ops
from refusal_kernels.errors import InputError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HIDDEN = [1, 7, 111, 500, 1024, 3584]
TOKENS = [0, 1, 19, 99]
INF = math.inf
CPU_ONLY = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def rows(tokens, hidden, dtype=torch.float32):
    return torch.randn(tokens, hidden).to(dtype)


def unit(hidden):
    v = torch.randn(hidden, dtype=torch.float64)
    return (v / v.norm()).float()


def program(*slots):
    """[(v, u, (a, c, b, low, high)), ...] -> bank [1, 2, slots, hidden], params [1, slots, 5]."""
    bank = torch.stack([torch.stack([s[0] for s in slots]), torch.stack([s[1] for s in slots])])
    return bank.unsqueeze(0).contiguous(), torch.tensor([[s[2] for s in slots]])


def ablation(hidden, strength=1.0):
    r = unit(hidden)
    return r, *program((r, r, (-strength, 0.0, 0.0, -INF, INF)))


def exact(x, residual, bank, params, route=None):
    """The formula in float64, one token at a time."""
    s = x.double() if residual is None else x.double() + residual.double()
    s = s.reshape(-1, x.shape[-1])
    h = s.clone()
    for i in range(len(s)):
        p = 0 if route is None else int(route[i])
        if p < 0:
            continue
        for v, u, (a, c, b, low, high) in zip(
            bank[p, 0].double(), bank[p, 1].double(), params[p].tolist(), strict=True
        ):
            t = float(v @ s[i])
            h[i] += (a * t + c * min(max(t, low), high) + b) * u
    return h.reshape(x.shape)


def eager(x, residual, r):
    """What a careful user writes in PyTorch, in the model's dtype."""
    s = x + residual
    return s - (s @ r.to(s.dtype)).unsqueeze(-1) * r.to(s.dtype)


def worst(actual, expected):
    return (actual.double() - expected).abs().max().item() if actual.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("tokens", TOKENS)
def test_add_steer_is_at_least_as_accurate_as_eager(backend, dtype, hidden, tokens):
    x, residual = rows(tokens, hidden, dtype), rows(tokens, hidden, dtype)
    r, bank, params = ablation(hidden)
    h = ops.add_steer(x, residual, bank, params)
    assert h.dtype == dtype and h.shape == x.shape and h.is_contiguous()
    want = exact(x, residual, bank, params)
    # one unit in the last place of the largest value covers tiny cases where eager is exact by luck
    ulp = torch.finfo(dtype).eps * float(want.abs().max()) if tokens else 0.0
    assert worst(h, want) <= max(worst(eager(x, residual, r), want), ulp, 1e-6)
    assert torch.equal(ops.add_steer(x, residual, bank, params), h)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_component_is_gone_and_twice_is_once(backend, dtype):
    x, residual = rows(50, 1024, dtype), rows(50, 1024, dtype)
    r, bank, params = ablation(1024)
    h = ops.add_steer(x, residual, bank, params)
    eps = torch.finfo(dtype).eps
    assert ((h.double() @ r.double()).abs() <= 4 * eps * h.double().norm(dim=-1)).all()
    again = ops.add_steer(h, None, bank, params)
    assert worst(again, h.double()) <= 4 * eps * float(h.abs().max())


PROGRAMS = {
    "add": (0.0, 0.0, 2.5, -INF, INF),
    "set": (-1.0, 0.0, 3.0, -INF, INF),
    "clamp": (-1.0, 1.0, 0.0, -0.5, 0.25),
    "positive part": (-1.0, 1.0, 0.0, -INF, 0.0),
    "half": (-0.5, 0.0, 0.0, -INF, INF),
}


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


def test_no_slots_is_the_plain_add(backend):
    x, residual = rows(3, 20), rows(3, 20)
    bank, params = torch.empty(1, 2, 0, 20), torch.empty(1, 0, 5)
    assert torch.equal(ops.add_steer(x, residual, bank, params), x + residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_route(backend, dtype):
    x, residual = rows(40, 96, dtype), rows(40, 96, dtype)
    banks = [program((unit(96), unit(96), PROGRAMS[n])) for n in ("set", "add", "clamp")]
    bank, params = (torch.cat(parts) for parts in zip(*banks, strict=True))
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
    dtype=st.sampled_from(DTYPES),
    slots=st.integers(1, 4),
)
@CPU_ONLY
def test_any_alignment(backend, tokens, hidden, offset, dtype, slots):
    def misaligned():
        flat = torch.randn(tokens * hidden + offset).to(dtype)
        return flat[offset:].view(tokens, hidden)

    x, residual = misaligned(), misaligned()
    vectors = [torch.randn(hidden) / math.sqrt(hidden) for _ in range(slots)]
    bank, params = program(*[(v, v, (-0.5, 0.25, 0.1, -1.0, 1.0)) for v in vectors])
    want = exact(x, residual, bank, params)
    tolerance = 3 * torch.finfo(dtype).eps * float(want.abs().max()) + 1e-6 if tokens else 0
    assert worst(ops.add_steer(x, residual, bank, params), want) <= tolerance


def test_more_than_two_to_the_31_elements():
    # every input row is the same memory; only the output (4 GB) is real
    tokens, hidden = 2**18 + 1, 8192
    x = rows(1, hidden, torch.bfloat16).expand(tokens, hidden)
    _, bank, params = ablation(hidden)
    with ops.use_backend("cpu"):
        want = ops.add_steer(x[:1], x[:1], bank, params)
        h = ops.add_steer(x, x, bank, params)
    assert h.numel() > 2**31
    assert torch.equal(h[-1], want[0]) and torch.equal(h[tokens // 2], want[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row(backend, dtype):
    x, residual = rows(6, 40, dtype), rows(6, 40, dtype)
    _, bank, params = ablation(40)
    want = ops.add_steer(x, residual, bank, params)
    x[1, 3], x[4, 0] = math.nan, math.inf
    h = ops.add_steer(x, residual, bank, params)
    clean = [0, 2, 3, 5]
    assert torch.equal(h[clean], want[clean])
    assert h[1].isnan().all() and not h[4].isfinite().any()


def test_half_precision_conversions_are_exact(backend):
    # every bit pattern of both 16-bit types goes through the widening and the rounding unchanged
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    bank, params = torch.zeros(1, 2, 1, 64), torch.zeros(1, 1, 5)
    route = torch.full((1024,), -1, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype).reshape(1024, 64)
        h = ops.add_steer(x, None, bank, params, route)
        numbers = ~x.isnan()
        assert h[~numbers].isnan().all()
        if backend == "triton" and dtype == torch.bfloat16:  # the interpreter has no subnormals
            numbers &= x.float().abs() >= torch.finfo(dtype).tiny
        assert torch.equal(h[numbers], x[numbers])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even(backend, dtype):
    # x + residual in float32 has more digits than the 16-bit type: ties, overflow, subnormals
    scale = torch.logspace(-26, 15, 64 * 200, base=2.0).view(200, 64)
    x = (torch.rand(200, 64) * scale).to(dtype)  # below 2^15: finite, while their sum may overflow
    residual = (torch.randn(200, 64).clamp(-2, 2) / 2 * scale).to(dtype)
    bank, params = torch.zeros(1, 2, 1, 64), torch.zeros(1, 1, 5)
    route = torch.full((200,), -1, dtype=torch.int32)
    assert torch.equal(ops.add_steer(x, residual, bank, params, route), x + residual)


def test_massive_channel_and_float16_range(backend):
    # one channel of 800 (seen in real models): s.s overflows float16, so sums must be in float32
    x, residual = rows(8, 4096, torch.float16), rows(8, 4096, torch.float16)
    x[:, 7] = 800.0
    _, bank, params = ablation(4096)
    want = exact(x, residual, bank, params)
    assert worst(ops.add_steer(x, residual, bank, params), want) <= 800 * torch.finfo(x.dtype).eps
    normed = ops.rms_norm(x, torch.ones(4096, dtype=torch.float16), 1e-6)
    assert normed.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
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
@pytest.mark.parametrize("hidden", [1, 7, 111, 1024, 9000])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_steer_rms_norm(backend, dtype, hidden, routed, with_residual):
    x = rows(9, hidden, dtype)
    residual = rows(9, hidden, dtype) if with_residual else None
    weight = torch.randn(hidden).to(dtype)
    banks = [program((unit(hidden), unit(hidden), PROGRAMS[n])) for n in ("set", "clamp")]
    bank, params = (torch.cat(parts) for parts in zip(*banks, strict=True))
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


def test_add_steer_rms_norm_is_more_accurate_than_what_it_replaces(backend):
    # h is not rounded before the norm reads it
    x, residual = rows(40, 1024, torch.bfloat16), rows(40, 1024, torch.bfloat16)
    r, bank, params = ablation(1024)
    weight = torch.ones(1024, dtype=torch.bfloat16)
    normed, _ = ops.add_steer_rms_norm(x, residual, weight, 1e-6, bank, params)
    exact_h = exact(x, residual, bank, params)
    want = exact_h / (exact_h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    h = eager(x, residual, r).float()
    unfused = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    error, unfused_error = ((t.double() - want).pow(2).mean() for t in (normed, unfused))
    assert error < 0.7 * unfused_error


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


# --- moments -------------------------------------------------------------------------------------


def state(groups, positions, hidden):
    return (
        torch.zeros(groups, positions, dtype=torch.int64),
        torch.zeros(groups, positions, hidden, dtype=torch.float64),
        torch.zeros(groups, positions, hidden, dtype=torch.float64),
    )


def exact_moments(batches, groups, positions):
    """count, mean and sum of squared deviations of all rows at once, in float64."""
    found = {}
    for activations, index, group in batches:
        for b in range(len(group)):
            for t in range(index.shape[1]):
                if index[b, t] >= 0 and group[b] >= 0:
                    key = int(group[b]), int(index[b, t])
                    found.setdefault(key, []).append(activations[b, t].double())
    count, mean, m2 = state(groups, positions, batches[0][0].shape[-1])
    for key, values in found.items():
        stacked = torch.stack(values)
        count[key], mean[key] = len(values), stacked.mean(0)
        m2[key] = (stacked - stacked.mean(0)).pow(2).sum(0)
    return count, mean, m2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 17, 130, 300])
def test_moments(backend, dtype, hidden):
    batches = []
    for tokens in (5, 40, 1):
        activations = (10 * torch.randn(7, tokens, hidden) + 300).to(dtype)
        index = torch.randint(-1, 3, (7, tokens), dtype=torch.int32)
        group = torch.tensor([0, 1, -1, 1, 0, 0, 1], dtype=torch.int32)
        # what is not read may hold anything
        activations[(index < 0) | (group < 0).unsqueeze(-1)] = math.nan
        batches.append((activations, index, group))
    batches.append((torch.empty(0, 4, hidden, dtype=dtype), torch.empty(0, 4, dtype=torch.int32),
                    torch.empty(0, dtype=torch.int32)))  # fmt: skip
    got = state(2, 3, hidden)
    for batch in batches:
        ops.moments_(*got, *batch)
    count, mean, m2 = exact_moments(batches, 2, 3)
    assert torch.equal(got[0], count)
    assert torch.allclose(got[1], mean, rtol=1e-7, atol=0)
    assert torch.allclose(got[2], m2, rtol=2e-5, atol=1e-9)

    again = state(2, 3, hidden)
    for batch in batches:
        ops.moments_(*again, *batch)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_moments_of_views(backend):
    whole = torch.randn(6, 9, 50)
    index, group = torch.zeros(6, 9, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    for view in (whole[::2, 1::3, 5:41], whole.transpose(0, 1)[:5, :4, ::2]):
        batch, tokens, hidden = view.shape
        args = index[:batch, :tokens].contiguous(), group[:batch].contiguous()
        got, want = state(1, 1, hidden), state(1, 1, hidden)
        ops.moments_(*got, view, *args)
        ops.moments_(*want, view.contiguous(), *args)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_moments_do_not_depend_on_the_threads():
    activations = torch.randn(8, 64, 4096)
    index, group = torch.zeros(8, 64, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    results, threads = [], torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(state(1, 1, 4096))
        ops.moments_(*results[-1], activations, index, group)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [(4, 3, r"index\[0, 0\] is 3"), (4, -2, r"index\[0, 0\] is -2"), (5, 2, r"group\[0\] is 2")],
)
def test_moments_out_of_range_raise_and_change_nothing(position, value, words):
    args = [
        *state(2, 3, 8),
        torch.randn(2, 4, 8),
        torch.zeros(2, 4, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
    ]
    args[position].view(-1)[0] = value
    with pytest.raises(RuntimeError, match=words):
        ops.moments_(*args)
    assert not args[0].any() and not args[1].any()


# --- gradients, registration, backends -----------------------------------------------------------


def random_program(hidden, programs=2, slots=2, dtype=torch.float32):
    bank = torch.randn(programs, 2, slots, hidden, dtype=dtype) / math.sqrt(hidden)
    params = torch.randn(programs, slots, 5, dtype=dtype)
    params[..., 3], params[..., 4] = -0.7, 0.6
    return bank, params


@pytest.mark.parametrize("routed", [False, True])
def test_gradients_of_the_reference_are_right(routed):
    bank, params = random_program(6, dtype=torch.float64)
    route = torch.tensor([0, -1, 1, 0], dtype=torch.int32) if routed else None
    x, residual = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (x, residual, bank.requires_grad_(), params.requires_grad_())
    assert torch.autograd.gradcheck(lambda *i: ops.add_steer(*i, route), inputs)


@pytest.mark.parametrize("routed", [False, True])
def test_gradients_of_the_kernels_equal_the_reference(backend, routed):
    bank, params = random_program(40)
    route = torch.tensor([0, -1, 1, 0, 1], dtype=torch.int32) if routed else None
    inputs = [rows(5, 40), rows(5, 40), bank, params]
    weight, g = torch.randn(40), rows(5, 40)

    def gradients(name):
        leaves = [i.clone().requires_grad_() for i in inputs]
        w = weight.clone().requires_grad_()
        with ops.use_backend(name):
            h = ops.add_steer(*leaves, route)
            y = ops.rms_norm(h, w, 1e-6, 1.0)
            z, k = ops.add_steer_rms_norm(h, y, w, 1e-6, *leaves[2:], route, 0.5)
            loss = (z * g).sum() + (k * g * 0.1).sum()
            loss = loss + 1e-2 * ops.scores(h, leaves[2], route).square().sum()
        return torch.autograd.grad(loss, [*leaves, w])

    for got, want in zip(gradients(backend), gradients("reference"), strict=True):
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_opcheck():
    bank, params = random_program(24)
    x, residual = rows(6, 24), rows(6, 24)
    route = torch.tensor([0, 1, -1, 0, 1, 1], dtype=torch.int32)
    namespace = torch.ops.refusal_kernels
    for grad in (False, True):
        args = [t.clone().requires_grad_(grad) for t in (x, residual, bank, params)]
        for r in (None, route):
            torch.library.opcheck(namespace.add_steer.default, (*args, r))
            torch.library.opcheck(namespace.scores.default, (args[0], args[2], r))
        weight = torch.randn(24, requires_grad=grad)
        torch.library.opcheck(namespace.rms_norm.default, (args[0], weight, 1e-6, 1.0))
        torch.library.opcheck(
            namespace.add_steer_rms_norm.default,
            (args[0], args[1], weight, 1e-6, args[2], args[3], route, 1.0),
        )
    torch.library.opcheck(namespace.add_steer_inference.default, (x, residual, bank, params, route))
    torch.library.opcheck(namespace.add_steer_.default, (x, residual, bank, params, route))
    index = torch.randint(-1, 3, (2, 3), dtype=torch.int32)
    group = torch.tensor([0, 1], dtype=torch.int32)
    torch.library.opcheck(
        namespace.moments_.default, (*state(2, 3, 24), x.view(2, 3, 24), index, group)
    )


def test_compiled_without_a_graph_break_and_dials_stay_live():
    _, bank, params = ablation(32)
    x, residual = rows(4, 32), rows(4, 32)

    @torch.compile(fullgraph=True)
    def block(x, residual, bank, params):
        h = ops.add_steer(x * 2, residual, bank, params)
        return ops.rms_norm(h, torch.ones(32), 1e-6) + ops.scores(h, bank)

    def plain(x, residual, bank, params):
        h = ops.add_steer(x * 2, residual, bank, params)
        return ops.rms_norm(h, torch.ones(32), 1e-6) + ops.scores(h, bank)

    args = (x, residual, bank, params)
    assert torch.allclose(block(*args), plain(*args), atol=1e-6)
    params[..., 0] = -0.25  # what a compiled model must follow
    assert torch.allclose(block(*args), plain(*args), atol=1e-6)


def test_use_backend_and_explain(monkeypatch):
    explanation = ops.explain(torch.empty(1))
    assert explanation.chosen == "cpu" and "reference" in explanation.passed_over
    assert ops.explain(dtype=torch.float64).chosen == "reference"
    with ops.use_backend("reference"):
        assert ops.explain().chosen == "reference"
    with pytest.raises(InputError, match=r"no backend 'tritn'.*cpu, cuda, triton, reference"):
        ops.use_backend("tritn").__enter__()
    with ops.use_backend("cpu"), pytest.raises(InputError, match="float64"):
        ops.explain(dtype=torch.float64)
    monkeypatch.setenv("REFUSAL_KERNELS_BACKEND", "reference")
    assert ops.explain().chosen == "reference"
    monkeypatch.setenv("REFUSAL_KERNELS_BACKEND", "nonsense")
    with pytest.raises(InputError, match="REFUSAL_KERNELS_BACKEND"):
        ops.explain()


def test_use_backend_really_switches(monkeypatch):
    calls = []
    served = dict(ops.BACKENDS["reference"].ops)
    original = served["add_steer"]
    served["add_steer"] = lambda *a: calls.append(1) or original(*a)
    monkeypatch.setattr(
        "refusal_kernels.ops.registry.BACKENDS",
        {**ops.BACKENDS, "reference": type(ops.BACKENDS["reference"])(
            "reference", served, ops.BACKENDS["reference"].why_not)},
    )  # fmt: skip
    _, bank, params = ablation(8)
    with ops.use_backend("reference"):
        ops.add_steer(rows(1, 8), None, bank, params)
    assert calls == [1]
