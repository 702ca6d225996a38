"""Gradients: the formulas in float64, the kernels beside them, and training through an edit."""

import contextlib
import copy
import math

import pytest
import torch
from programs import DTYPES, random_program, rows, worst
from tiny import plain_hooks, tiny_model

import refusal_kernels as rk
from refusal_kernels import ops
from refusal_kernels.ops import reference


def gradcheck_inputs(hidden):
    x, residual = (torch.randn(4, hidden, dtype=torch.float64, requires_grad=True) for _ in "xr")
    bank, params = random_program(hidden, dtype=torch.float64)
    return x, residual, bank.requires_grad_(), params.requires_grad_()


@pytest.mark.parametrize("routed", [False, True])
def test_gradients_of_the_reference_are_right(routed):
    route = torch.tensor([0, -1, 1, 0], dtype=torch.int32) if routed else None
    inputs = gradcheck_inputs(6)
    assert torch.autograd.gradcheck(lambda *i: ops.add_steer(*i, route), inputs)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, r, w, *program: ops.add_steer_rms_norm(x, r, w, 1e-5, *program, route, 0.5),
        (*inputs[:2], weight, *inputs[2:]),
    )


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_the_written_adjoints_are_those_of_the_reference(routed, beside):
    """The formulas that the kernels implement, against automatic differentiation in float64."""
    route = torch.tensor([0, -1, 1, 0], dtype=torch.int32) if routed else None
    x, residual, bank, params = gradcheck_inputs(6)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    d, e = torch.randn(2, 4, 6, dtype=torch.float64)

    h, t = reference.add_steer_scores(x, residual, bank, params, route)
    wanted = torch.autograd.grad((h * d).sum(), (x, bank, params))
    assert torch.allclose(reference.add_steer_backward(d, t, bank, params, route), wanted[0])
    got = reference.program_backward(d, x, residual, bank, params, route)
    assert all(torch.allclose(a, b) for a, b in zip(got, wanted[1:], strict=True))

    normed, h, t = reference.add_steer_rms_norm_scores(
        x, residual, weight, 1e-5, bank, params, route, 0.5
    )
    loss = (normed * d).sum() + ((h * e).sum() if beside else 0.0)
    (wanted_s,) = torch.autograd.grad(loss, x)
    grads = (d, e if beside else None, h, t, weight, 1e-5, bank, params, route, 0.5)
    assert torch.allclose(reference.add_steer_rms_norm_backward(*grads), wanted_s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("hidden", [5, 7, 640, 17001])
def test_adjoint_kernels(backend, dtype, slots, hidden):
    """Both adjoints against float64, with and without the gradient of h itself."""
    g, grad_h, h = (rows(6, hidden, dtype) for _ in range(3))
    bank, params = random_program(hidden, slots=slots)
    weight = torch.randn(hidden).to(dtype)
    route = torch.tensor([0, 1, -1, 0, 1, 1], dtype=torch.int32)
    scores = torch.randn(6, slots)  # inside the clamp's limits and outside
    scores[0, 0] = math.nan  # neither below nor above
    wide = (bank.double(), params.double(), route)
    for r, w in ((route, wide), (None, (*wide[:2], None))):
        got = ops.op_for("add_steer_backward", g)(g, scores, bank, params, r)
        want = reference.add_steer_backward(g.double(), scores.double(), *w)
        bound = torch.finfo(dtype).eps + 1e-6
        assert got.dtype == dtype
        assert worst(got, want) <= bound * float(want.abs().max())
        for beside in (grad_h, None):
            got = ops.op_for("add_steer_rms_norm_backward", g)(
                g, beside, h, scores, weight, 1e-5, bank, params, r, 1.0
            )
            want = reference.add_steer_rms_norm_backward(
                g.double(), None if beside is None else beside.double(), h.double(),
                scores.double(), weight.double(), 1e-5, *w, 1.0,
            )  # fmt: skip
            assert got.dtype == dtype
            assert worst(got, want) <= 2 * bound * float(want.abs().max())


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


def test_frozen_vectors_keep_neither_x_nor_the_residual(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch keeps what it likes")
    bank, params = random_program(64, slots=1)
    x, residual = rows(5, 64).requires_grad_(), rows(5, 64).requires_grad_()
    weight, kept = torch.randn(64), []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        h = ops.add_steer(x, residual, bank, params)
    assert sum(t.numel() for t in kept) == 5 + bank.numel() + params.numel()  # the scores

    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        normed, h = ops.add_steer_rms_norm(x, residual, weight, 1e-6, bank, params)
    mine = [t for t in kept if t.numel() == x.numel()]
    assert len(mine) == 1 and mine[0].data_ptr() == h.data_ptr()  # the caller holds h anyway
    (normed.sum() + h.square().sum()).backward()
    assert x.grad is not None and torch.equal(x.grad, residual.grad)


def test_unused_outputs_and_second_derivatives(backend):
    bank, params = random_program(32)
    x, weight = rows(4, 32).requires_grad_(), torch.randn(32)
    normed, h = ops.add_steer_rms_norm(x, None, weight, 1e-6, bank, params)
    (of_h,) = torch.autograd.grad(h.square().sum(), x, retain_graph=True)
    (both,) = torch.autograd.grad(normed.square().sum() + h.square().sum(), x, retain_graph=True)
    (of_normed,) = torch.autograd.grad(normed.square().sum(), x, retain_graph=True)
    assert torch.allclose(both, of_h + of_normed, rtol=1e-4, atol=1e-4 * float(both.abs().max()))
    if backend != "reference":
        (g,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            g.sum().backward()


def test_a_lora_trains_under_an_edit():
    """The patched model learns what it is asked; its gradients are those of plain hooks."""
    peft = pytest.importorskip("peft")
    base = tiny_model("llama", num_hidden_layers=2)
    vector = torch.randn(base.config.hidden_size)
    edit = rk.Ablate(rk.Direction(vector))
    tokens = torch.randint(0, base.config.vocab_size, (4, 12))

    def train(patched):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        lora = peft.get_peft_model(copy.deepcopy(base), config)
        learned = [p for p in lora.parameters() if p.requires_grad]
        assert 0 < len(learned) < len(list(lora.parameters()))
        optimizer, losses, first = torch.optim.Adam(learned, lr=2e-2), [], []
        with patched(lora.base_model.model):
            for _ in range(15):
                loss = lora(input_ids=tokens, labels=tokens).loss
                optimizer.zero_grad()
                loss.backward()
                first = first or [p.grad.clone() for p in learned]
                optimizer.step()
                losses.append(float(loss.detach()))
        return first, losses

    fused, losses = train(lambda model: rk.patch(model, edit))
    hooks, others = train(lambda model: plain_hooks(model, ablate=vector))
    unsteered, _ = train(lambda model: contextlib.nullcontext())
    assert losses[-1] < 0.7 * losses[0]
    assert losses == pytest.approx(others, rel=1e-2)
    for a, b, c in zip(fused, hooks, unsteered, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        assert c.abs().max() == 0 or not torch.allclose(a, c, rtol=1e-2)  # the edit matters
