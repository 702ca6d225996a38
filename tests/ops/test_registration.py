"""What the dispatcher and the compiler see, and which backend serves a call."""

import dataclasses
import importlib

import emulated_cuda
import pytest
import torch
from backends import DEVICES
from programs import ablation, random_program, rows, state
from tiny import full
from torch._subclasses.fake_tensor import FakeTensorMode

from refusal_kernels import ops
from refusal_kernels.errors import InputError
from refusal_kernels.ops import registry

NAMESPACES = {"cpu": "refusal_kernels", "cuda": "refusal_kernels"}
NAMESPACES[emulated_cuda.NAME] = emulated_cuda.NAMESPACE
if DEVICES["triton"] == "cuda":  # the interpreter cannot be traced
    NAMESPACES["triton"] = "refusal_kernels_triton"


@pytest.mark.parametrize(
    "backend_name",
    # registered like the CPU's, and slow
    [full(b) if b == emulated_cuda.NAME else b for b in DEVICES if b in NAMESPACES],
)
def test_opcheck(backend_name):
    namespace = getattr(torch.ops, NAMESPACES[backend_name])
    with torch.device(DEVICES[backend_name]):
        bank, params = random_program(24)
        x, residual = rows(6, 24), rows(6, 24)
        route = torch.tensor([0, 1, -1, 0, 1, 1], dtype=torch.int32)
        weight, index = torch.randn(24), torch.randint(-1, 3, (2, 3), dtype=torch.int32)
        group, moments = torch.tensor([0, 1], dtype=torch.int32), state(2, 3, 24)

    def check(**calls):
        for op, args in calls.items():
            torch.library.opcheck(getattr(namespace, op).default, args)

    for grad in (False, True):
        x, residual, bank, params, weight = (
            t.detach().clone().requires_grad_(grad) for t in (x, residual, bank, params, weight)
        )
        program, norm = (bank, params, route), (weight, 1e-6)
        edit, normed = (x, residual, *program), (x, residual, *norm, *program, 1.0)
        check(add_steer=(x, residual, bank, params, None))
        check(add_steer=edit, add_steer_scores=edit, scores=(x, bank, route))
        check(add_steer_rms_norm=normed, add_steer_rms_norm_scores=normed)
        check(rms_norm=(x, *norm, 1.0))
    x, residual, bank, params, weight = (t.detach() for t in (x, residual, bank, params, weight))
    program, t = (bank, params, route), x[:, :2].contiguous()
    edit, after = (x, residual, *program), (weight, 1e-6, *program, 1.0)
    check(add_steer_backward=(x, t, *program), add_steer_=edit)
    for grad_h in (residual, None):
        check(add_steer_rms_norm_backward=(x, grad_h, x, t, *after))
    check(moments_=(*moments, x.view(2, 3, 24), index, group))
    if backend_name != "triton":  # Triton's own namespace has no forms without a gradient
        check(add_steer_inference=edit, add_steer_rms_norm_inference=(x, residual, *after))


@pytest.mark.xdist_group("inductor")
@pytest.mark.parametrize("device", sorted({d for b, d in DEVICES.items() if b in NAMESPACES}))
def test_compiled_without_a_graph_break_and_dials_stay_live(device):
    with torch.device(device):
        _, bank, params = ablation(32)
        x, residual, weight = rows(4, 32), rows(4, 32), torch.ones(32)

    def plain(x, residual, bank, params):
        h, t = ops.add_steer(x * 2, residual, bank, params, return_scores=True)
        normed, k = ops.add_steer_rms_norm(h, x, weight, 1e-6, bank, params)
        return ops.rms_norm(h, weight, 1e-6) + ops.scores(h, bank) + normed + k + t

    torch._dynamo.reset()
    block = torch.compile(plain, fullgraph=True)
    args = (x, residual, bank, params)
    assert torch.allclose(block(*args), plain(*args), atol=1e-5)
    params[..., 0] = -0.25  # what a compiled model must follow
    assert torch.allclose(block(*args), plain(*args), atol=1e-5)

    gradients = []
    for function in (block, plain):
        leaf = x.clone().requires_grad_()
        function(leaf, residual, bank, params).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, atol=1e-4 * float(gradients[1].abs().max()))


def test_an_op_is_found_in_a_graph_that_writes_to_a_dictionary():
    """As transformers does in a forward, to collect what modules return."""
    _, bank, params = ablation(32)
    x, seen = rows(4, 32), {}

    @torch.compile(fullgraph=True, backend="eager")
    def forward(x):
        seen["x"] = x
        return registry.serving("add_steer_inference", x)(x, None, bank, params, None)

    torch._dynamo.reset()
    with torch.inference_mode():
        h = forward(x)
        assert torch.equal(h, ops.add_steer(x, None, bank, params)) and not torch.equal(h, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_captured_graph_follows_the_dials(name):
    if name not in DEVICES:
        pytest.skip("this build has no CUDA kernels")
    with torch.device("cuda"), ops.use_backend(name):
        bank, params = random_program(4096, slots=1)
        x, residual = rows(16, 4096, torch.bfloat16), rows(16, 4096, torch.bfloat16)
        weight, route = torch.randn(4096).bfloat16(), torch.zeros(16, dtype=torch.int32)
        count, mean, m2 = state(1, 1, 4096)
        index, group = torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)

        def step():
            args = (x, residual, weight, 1e-6, bank, params, route)
            ops.moments_(count, mean, m2, x.view(4, 4, 4096), index, group)
            return (*ops.add_steer_rms_norm(*args, return_scores=True), ops.scores(x, bank))

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for change in (lambda: params.mul_(0.5), lambda: route.fill_(-1), lambda: x.neg_()):
            change()
            count.zero_(), mean.zero_(), m2.zero_()
            graph.replay()
            moments = mean.clone()
            count.zero_(), mean.zero_(), m2.zero_()
            for got, want in zip((*captured, moments), (*step(), mean), strict=True):
                assert torch.equal(got, want)


def test_use_backend_and_explain(monkeypatch):
    explanation = ops.explain(torch.empty(1))
    assert explanation.chosen == "cpu" and "reference" in explanation.passed_over
    assert ops.explain(dtype=torch.float64).chosen == "reference"
    with ops.use_backend("reference"):
        assert ops.explain().chosen == "reference"
    with pytest.raises(InputError, match=r"no backend 'tritn'.*cpu, cuda, triton.*, reference"):
        ops.use_backend("tritn").__enter__()
    with ops.use_backend("cpu"), pytest.raises(InputError, match="float64"):
        ops.explain(dtype=torch.float64)
    monkeypatch.setenv("REFUSAL_KERNELS_BACKEND", "reference")
    assert ops.explain().chosen == "reference"
    monkeypatch.setenv("REFUSAL_KERNELS_BACKEND", "nonsense")
    with pytest.raises(InputError, match="REFUSAL_KERNELS_BACKEND"):
        ops.explain()


def test_a_backend_is_registered_with_the_ops_schemas(monkeypatch):
    monkeypatch.setattr(registry, "BACKENDS", dict(registry.BACKENDS))
    T = torch.Tensor
    table, why_not = dict(ops.BACKENDS["reference"].ops), lambda device, dtype: None

    def swapped(x: T, residual: T | None, params: T, bank: T, route: T | None = None) -> T:
        raise NotImplementedError

    for name, given, words in (
        ("cpu", table, "a backend 'cpu' already"),
        ("mine", {k: v for k, v in table.items() if k != "scores"}, "has no op scores"),
        ("mine", {**table, "moment": swapped}, "has an unknown op moment"),
        ("mine", {**table, "add_steer": swapped}, "add_steer of the backend 'mine' is .*expected"),
    ):
        with pytest.raises(InputError, match=words):
            ops.register_backend(name, given, why_not)
    ops.register_backend("mine", table, lambda d, dtype: "not for you" if d == "cpu" else None)
    assert list(registry.BACKENDS)[-2:] == ["mine", "reference"]
    assert ops.explain(device="meta").chosen == "mine"
    with ops.use_backend("mine"), pytest.raises(InputError, match="not for you"):
        ops.explain()


@pytest.fixture
def anew():
    """What serves a call is kept from call to call; here the backends are exchanged."""
    registry._serving.cache_clear()
    yield
    registry._serving.cache_clear()


def test_use_backend_really_switches(monkeypatch, anew):
    calls = []
    served = dict(ops.BACKENDS["reference"].ops)
    original = served["add_steer_inference"]  # the form of a call that needs no gradient
    served["add_steer_inference"] = lambda *a: calls.append(1) or original(*a)
    changed = dataclasses.replace(ops.BACKENDS["reference"], ops=served)
    monkeypatch.setattr(registry, "BACKENDS", {**ops.BACKENDS, "reference": changed})
    _, bank, params = ablation(8)
    with ops.use_backend("reference"):
        ops.add_steer(rows(1, 8), None, bank, params)
    assert calls == [1]


def test_triton_tells_copied_rows_of_a_tensor_without_an_address():
    """What is traced has strides and no address; `add_steer_` has to copy back from copies."""
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    has_rows = importlib.import_module("refusal_kernels.ops.triton_ops")._has_rows
    with FakeTensorMode():
        t = torch.empty(4, 6, 8)
        assert has_rows(t) and has_rows(t[:, :1]) and has_rows(t[..., :4])
        assert not has_rows(t[:, :3]) and not has_rows(t.transpose(0, 1)) and not has_rows(t.mT)
