"""The streaming moments on every backend against float64."""

import math

import pytest
import torch
from programs import DTYPES, state

from refusal_kernels import ops


def exact_moments(batches, groups, positions):
    """count, mean and sum of squared deviations of all rows at once, in float64."""
    values_of = {}
    for activations, index, group in batches:
        for b in range(len(group)):
            for t in range(index.shape[1]):
                if index[b, t] >= 0 and group[b] >= 0:
                    key = int(group[b]), int(index[b, t])
                    values_of.setdefault(key, []).append(activations[b, t].double())
    count, mean, m2 = state(groups, positions, batches[0][0].shape[-1])
    for key, values in values_of.items():
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
