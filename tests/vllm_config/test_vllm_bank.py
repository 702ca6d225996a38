"""The bank of a vLLM worker, on places without a model, and the ops under vLLM's compiler."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from refusal_kernels import Direction, InputError
from refusal_kernels.vllm.bank import Bank
from refusal_kernels.vllm.families import ADD, START, EnginePlace, architecture_of
from refusal_kernels.vllm.programs import parse_program
from refusal_kernels.vllm.requests import Steering

HIDDEN = 8


def bank(rows=3, slots=2, tokens=16, device="cpu"):
    layer = torch.nn.Identity()
    places = [
        EnginePlace("embed", START, layer, feeds=0),
        EnginePlace("layers.0.attn", ADD, layer, 0, frozenset({"attn"})),
        EnginePlace("layers.0.mlp", ADD, layer, 0, frozenset({"mlp"}), 1),
    ]
    return Bank(places, HIDDEN, rows, slots, tokens, device)


def test_a_row_holds_a_program_at_its_strength_and_its_places(directions):
    made = bank()
    program = parse_program("p", [{"ablate": "r"}, {"add": "t", "block_input": 1}], directions)
    made.add(program)
    (row,) = made.rows_of([Steering(program.version, 0.25)])
    unit = directions["r"].unit
    assert torch.equal(made.vectors[row, :, 0], torch.stack([unit, unit]))
    assert torch.equal(made.vectors[row, 1, 1], directions["t"].vector)
    assert made.params[:, row, 0, 0].tolist() == [-0.25] * 3
    assert made.params[:, row, 1, 2].tolist() == [0.0, 0.0, 0.25]


def test_rows_are_reused_the_longest_unused_first_and_never_within_a_batch(directions):
    made = bank(rows=3)
    program = parse_program("p", {"ablate": "r"}, directions)
    made.add(program)
    asked = [Steering(program.version, 0.1 * k) for k in range(1, 40)]
    rows = made.rows_of(asked[:3])
    assert sorted(rows) == [0, 1, 2]
    assert made.rows_of([asked[0], asked[3]]) == (rows[0], rows[1])  # 1 was unused the longest
    for k in range(4, 36):  # every batch full, nothing in common with the last
        batch = asked[k : k + 3]
        rows = made.rows_of(batch)
        assert len(set(rows)) == 3
        written = made.params[0, list(rows), 0, 0]
        assert torch.allclose(written, torch.tensor([-s.strength for s in batch]))


class NeverWaiting(TorchDispatchMode):
    """Fails where an operation could wait for the device: a value read, a copy that blocks."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        hosts = [t for t in tensors if t.device.type == "cpu"]
        copies = operation is torch.ops.aten.copy_.default and args[2:] == (True,)
        assert len(hosts) in (0, len(tensors)) or copies, operation
        assert operation is not torch.ops.aten._local_scalar_dense.default
        return operation(*args, **kwargs)


def test_a_new_program_or_strength_does_not_wait_for_the_device(directions):
    made = bank(device="meta")  # a device whose values nobody can read
    programs = [parse_program("p", {"ablate": name}, directions) for name in ("r", "t")]
    for program in programs:
        made.add(program)
    with NeverWaiting():
        for strength in (1.0, 0.5, 0.25):
            asked = [Steering(program.version, strength) for program in programs]
            rows = made.rows_of([*asked, None])
            made.write_route(np.array(rows, dtype=np.int32))
    with pytest.raises(AssertionError), NeverWaiting():
        made.vectors[0].copy_(torch.zeros(2, 2, HIDDEN))


def test_programs_that_can_not_be_are_refused(directions):
    slanted = {**directions, "s": Direction(directions["r"].unit + directions["t"].unit)}
    other = {"o": Direction(torch.ones(5))}
    for given, those, words in (
        ([{"ablate": "r"}, {"ablate": "s"}], slanted, "orthonormal"),
        ({"ablate": "r", "block_input": 7}, directions, "no place of the model"),
        ({"ablate": "o"}, other, "hidden size 5; the model has 8"),
        (
            [{"rotate": "r", "b2": "t", "angle": 90}, {"set": "r", "value": 1}],
            directions,
            "3 slots; the engine was started with slots 2",
        ),
    ):
        with pytest.raises(InputError, match=words):
            bank().add(parse_program("p", given, those))


def test_programs_that_nobody_names_are_forgotten(directions):
    made = bank()
    programs = [parse_program("p", {"ablate": name}, directions) for name in ("r", "t")]
    for program in programs:
        made.add(program)
    a, b = (Steering(program.version, 1.0) for program in programs)
    made.rows_of([a, b])
    made.keep_only([b.version])
    assert made.versions == (b.version,)
    made.rows_of([b])
    with pytest.raises(RuntimeError, match="which this worker does not have"):
        made.rows_of([a])


def model(architectures):
    config = SimpleNamespace(architectures=architectures)
    return SimpleNamespace(hf_config=config, architecture=None)


def test_an_architecture_on_no_list_is_refused():
    with pytest.raises(InputError, match="NewForCausalLM cannot be steered"):
        architecture_of(model(["NewForCausalLM"]))
    assert architecture_of(model(["LlamaForCausalLM", "Other"])) == "LlamaForCausalLM"


# --- the ops under vLLM's compiler


def test_the_number_of_tokens_stays_open():
    """vLLM marks it as dynamic; a fake implementation that makes a constant of it is refused."""
    vectors, params = torch.randn(1, 2, 1, HIDDEN), torch.zeros(1, 1, 5)
    weight, route = torch.ones(HIDDEN), torch.full((64,), -1, dtype=torch.int32)
    ops = torch.ops.refusal_kernels

    def forward(x):
        rows = route[: x.shape[0]]
        h = ops.add_steer_inference(x, None, vectors, params, rows)
        args = (x, h, weight, 1e-6, vectors, params, rows, 0.0)
        normed, h = ops.add_steer_rms_norm_inference(*args)
        scored = ops.add_steer_rms_norm_scores(*args)
        return normed + ops.scores(h, vectors, None) + scored[2]

    x = torch.randn(5, HIDDEN)
    torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for tokens in (5, 7):
        y = x if tokens == 5 else torch.randn(tokens, HIDDEN)
        assert torch.equal(compiled(y), forward(y))
