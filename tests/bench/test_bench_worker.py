"""The worker, its process, and the float64 reference."""

import copy
import itertools
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from bench_methods import script

from refusal_kernels import Ablate, Direction, patch
from refusal_kernels.bench import shapes
from refusal_kernels.bench.checks import reference_logits
from refusal_kernels.bench.process import Process, WorkerError
from refusal_kernels.bench.worker import SITES, serve
from refusal_kernels.bench.worker.models import input_ids
from refusal_kernels.bench.worker.step import TimedStep, with_code_of_its_own


def test_a_worker_that_hangs_or_does_not_start_says_so(tmp_path):
    log = tmp_path / "log"
    process = Process(script(tmp_path, "sleep 600"), log, True, 1, "")
    with pytest.raises(WorkerError, match="failed: no answer in 1 s"):
        process.ask({"do": "close"}, 1.0)
    assert process.process.poll() is not None  # and what it started with it
    process = Process(script(tmp_path, "echo the last words >&2; exit 3"), log, True, 1, "")
    with pytest.raises(WorkerError, match="ended with code 3: the last words"):
        process.ask({"do": "close"}, 30.0)
    with pytest.raises(WorkerError, match="does not start: No such file"):
        Process(tmp_path / "nobody", log, True, 1, "")


def test_a_methods_file_may_read_its_own_names_in_a_compiled_model(method):
    half = serve.read_method(
        method("own_names", "SHARE = 0.5\nsteer = None\n\ndef half(x):\n    return SHARE * x\n")
    ).half

    def called(x):  # the compiler comes to the file's names from outside of it
        return half(x) + 1

    compiled = torch.compile(called, backend="eager", fullgraph=True)
    assert compiled(torch.tensor(4.0)).item() == 3.0


@pytest.mark.parametrize("sites", ['"input"', '("input")', '("block",)'])
def test_sites_that_are_none_are_refused(method, sites):
    with pytest.raises(TypeError, match="expected a tuple of attn, input, mlp, output"):
        serve.read_method(method("odd_sites", f"SITES = {sites}\n\ndef steer(model, task): ...\n"))


def test_no_method_runs_or_looks_through_the_compiled_graphs_of_another():
    looked_through = torch._dynamo.eval_frame._debug_get_cache_entry_list
    layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False), torch.nn.SiLU()]
    steps = [with_code_of_its_own(layer) for layer in layers]
    x = torch.randn(2, 4)
    for layer, step in zip(layers, steps, strict=True):
        compiled = torch.compile(step, backend="eager", dynamic=False)
        assert torch.equal(compiled(input=x), layer(x))
    assert [len(looked_through(step.__code__)) for step in steps] == [1, 1, 1]
    hooked = copy.deepcopy(layers[0])
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    compiled = torch.compile(with_code_of_its_own(hooked), backend="eager", dynamic=False)
    assert torch.equal(compiled(input=x), layers[0](x) + 1)


def test_every_method_comes_after_every_other_as_often():
    orders = [serve.shuffled("abcd", number) for number in range(1000)]
    assert orders == [serve.shuffled("abcd", number) for number in range(1000)]
    assert all(sorted(order) == list("abcd") for order in orders)
    for name in "abcd":
        assert 200 < sum(order[0] == name for order in orders) < 300
        after = Counter(one[-1] for one, two in itertools.pairwise(orders) if two[0] == name)
        assert set(after) == set("abcd") and max(after.values()) < 2 * min(after.values())


@pytest.mark.parametrize("work", ["decode", "prefill"])
def test_the_head_is_given_what_is_contiguous(work):
    """Otherwise its weights are copied for every row, in bfloat16 on a CPU."""
    model, seen = shapes.build("toy", shapes.config_of("toy"), "bfloat16"), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    cell = {"work": work, "batch": 2, "tokens": 12, "mode": "eager"}
    with torch.inference_mode():
        TimedStep(model, model, cell, nullcontext).once()
    assert [(*h.shape[:2], h.is_contiguous()) for h in seen] == [(2, 1, True)] * len(seen) != []


def test_the_reference_is_the_patched_model_in_float64():
    config = shapes.config_of("toy")
    model = shapes.build("toy", config, "float32")
    weights = [parameter.data for parameter in model.parameters()]
    directions = shapes.directions_of(model, 1)
    cell = {"work": "prefill", "batch": 2, "tokens": 12}
    ids = input_ids(cell, config.vocab_size)
    found = reference_logits(model, ids, directions, [0, 0], None, SITES)
    plain = reference_logits(model, ids, directions, [0, 0], None, ())
    assert found.dtype == torch.float64 and (found - plain).abs().max() > 0.1
    assert all(p.data is not None and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(a, p.data) for a, p in zip(weights, model.parameters(), strict=True))
    double = model.double()
    with torch.inference_mode(), patch(double, Ablate(Direction(directions[0]))):
        patched = double(ids).logits[:, -1]
    # the model's own norms and softmax turn to float32 in between; the reference's do not
    assert (patched - found).abs().max() < 1e-4 * found.abs().max()
