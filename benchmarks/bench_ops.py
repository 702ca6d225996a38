"""The CPU ops beside what they replace, interleaved in one run; `make bench`."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from conftest import REPORTS

from refusal_kernels import ops

SHAPE = (4096, 4096)
ROUNDS = 41
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compare(
    benchmark, title: str, base: str, name: str, variants: dict[str, Callable[[], object]]
) -> None:
    """Time all variants in every round; pytest-benchmark times ``name``, the setup the others.

    Recorded per variant: the median time, and median and quartiles of its ratio to ``base`` in the
    same round, so that a change of the machine's load cancels.
    """
    times: dict[str, list[float]] = {other: [] for other in variants if other != name}

    def others() -> None:
        for other, seconds in times.items():
            start = time.perf_counter()
            variants[other]()
            seconds.append(time.perf_counter() - start)

    benchmark.pedantic(variants[name], setup=others, rounds=ROUNDS, warmup_rounds=3)
    times[name] = list(benchmark.stats.stats.data)
    ratios = {}
    for variant in variants:
        seconds, reference = times[variant][-ROUNDS:], times[base][-ROUNDS:]
        per_round = [a / b for a, b in zip(seconds, reference, strict=True)]
        low, _, high = statistics.quantiles(per_round, n=4)
        ratios[variant] = {
            "median_ms": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(per_round),
            "quartiles": [low, high],
        }
    benchmark.extra_info.update({"base": base, "ratios": ratios})
    REPORTS.append({"title": title, "base": base, "ratios": ratios, "rounds": ROUNDS})


def operands(dtype):
    """x, residual, the unit direction, and the program that ablates it."""
    torch.manual_seed(0)
    x, residual = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
    r = torch.randn(SHAPE[-1], dtype=torch.float64)
    r = (r / r.norm()).float()
    bank = torch.stack([r, r]).view(1, 2, 1, -1).contiguous()
    params = torch.tensor([[[-1.0, 0.0, 0.0, -torch.inf, torch.inf]]])
    return x, residual, r, bank, params


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_steer(benchmark, dtype):
    x, residual, r, bank, params = operands(DTYPES[dtype])
    r = r.to(x.dtype)

    def eager():  # the sum, the dot product, the update
        s = x + residual
        t = s @ r
        return s - t.unsqueeze(-1) * r

    def eager_addcmul():  # the same with the update in one kernel
        s = x + residual
        return torch.addcmul(s, (s @ r).unsqueeze(-1), r, value=-1.0)

    variants = {
        "torch.add": lambda: torch.add(x, residual),
        "add_steer": lambda: ops.add_steer(x, residual, bank, params),
        "eager three-op form": eager,
        "eager with addcmul": eager_addcmul,
    }
    title = f"add_steer, {SHAPE[0]} x {SHAPE[1]}, {dtype}"
    compare(benchmark, title, "torch.add", "add_steer", variants)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_steer_in_place(benchmark, dtype):
    x, residual, _, bank, params = operands(DTYPES[dtype])
    target, other = residual.clone(), residual.clone()
    variants = {
        "torch.add, in place": lambda: torch.add(x, target, out=target),
        "add_steer_": lambda: ops.add_steer_(x, other, bank, params),
    }
    title = f"add_steer_, {SHAPE[0]} x {SHAPE[1]}, {dtype}"
    compare(benchmark, title, "torch.add, in place", "add_steer_", variants)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [4, 512, 4096])
def test_add_steer_rms_norm(benchmark, tokens, dtype):
    x, residual, r, bank, params = (
        t[:tokens] if t.shape == SHAPE else t for t in operands(DTYPES[dtype])
    )
    weight = torch.randn(SHAPE[-1]).to(x.dtype)

    def exact(x, residual):  # the same maths, for torch.compile
        h = x.float() + residual.float()
        h = h - (h * r).sum(-1, keepdim=True) * r
        normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()
        return normed.to(x.dtype), h.to(x.dtype)

    compiled = torch.compile(exact)
    variants = {
        "torch.add + rms_norm": lambda: torch.nn.functional.rms_norm(
            torch.add(x, residual), (SHAPE[-1],), weight, 1e-6
        ),
        "add_steer_rms_norm": lambda: ops.add_steer_rms_norm(
            x, residual, weight, 1e-6, bank, params
        ),
        "torch.compile": lambda: compiled(x, residual),
    }
    title = f"add_steer_rms_norm, {tokens} x {SHAPE[1]}, {dtype}"
    compare(benchmark, title, "torch.add + rms_norm", "add_steer_rms_norm", variants)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(benchmark, dtype):
    """[16, 256, 4096], every token into one mean, beside what the paper's code does."""
    torch.manual_seed(0)
    activations = torch.randn(16, 256, 4096).to(DTYPES[dtype])
    count = torch.zeros(1, 1, dtype=torch.int64)
    mean, m2 = torch.zeros(2, 1, 1, 4096, dtype=torch.float64)
    index, group = torch.zeros(16, 256, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    variants = {
        "double().sum": lambda: activations.double().sum((0, 1)),
        "moments_": lambda: ops.moments_(count, mean, m2, activations, index, group),
    }
    compare(benchmark, f"moments_, 16 x 256 x 4096, {dtype}", "double().sum", "moments_", variants)
