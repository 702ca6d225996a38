"""What the dispatcher and the compiler see, and which backend serves a call."""

import pytest
import torch
from programs import ablation, random_program, rows, state

from refusal_kernels import ops
from refusal_kernels.errors import InputError


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
