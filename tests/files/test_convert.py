"""Other tools' formats: what they hold, where it acts, and what they cannot say."""

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny import tiny_model
from vectors import HIDDEN, PROJECT, UNIT, numpy, random_direction, write

import refusal_kernels as rk
from refusal_kernels.direction import CANDIDATES, Candidates, Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.control_vector import SITE, ControlVector
from refusal_kernels.files.convert import convert, read
from refusal_kernels.files.tensors import write_tensors

LAYERS, IDS = 5, torch.arange(12).view(2, 6)


def refused(match: str, call: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


# What a runtime does, as hooks at the place where llama.cpp has build_cvec: the block's output.


def logits_as_llama_cpp(model: Any, rows: dict[int, Any]) -> torch.Tensor:
    """Run with ``direction.N`` as rows[N] = function of the stream, after block N."""
    hooks = [
        model.get_decoder()
        .layers[block]
        .register_forward_hook(
            lambda _, __, out, edit=edit: (
                (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)
            )
        )
        for block, edit in rows.items()
    ]
    try:
        return model(IDS).logits
    finally:
        for hook in hooks:
            hook.remove()


def check_patched(model: Any, edits: list[Any], expected: torch.Tensor) -> None:
    """Compare the logits of a patched model, which are not those of the unmodified one."""
    with rk.patch(model, *edits):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - model(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_addition_acts_where_llama_cpp_has_it(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, num_hidden_layers=LAYERS)
    rows = {n: random_direction(seed=n, scale=0.3).vector for n in (1, 3, LAYERS - 1)}
    keys = {"controlvector__model_hint": family, "controlvector__layer_count": 3}
    path = write(tmp_path / "a.gguf", numpy(rows), **keys)
    expected = logits_as_llama_cpp(model, {n: lambda h, v=v: h + v for n, v in rows.items()})
    vector = ControlVector.load(path)
    assert vector.layers == [2, 4, 5] and vector.model_hint == family
    check_patched(model, vector.interventions(LAYERS), expected)
    # one layer earlier or later is another edit
    for shift in (-1, 1):
        moved = {n + shift: lambda h, v=v: h + v for n, v in rows.items() if n + shift < LAYERS}
        assert (logits_as_llama_cpp(model, moved) - expected).abs().max() > 0.1


def test_what_is_written_acts_as_the_addition_it_was_made_from(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=LAYERS)
    direction = random_direction(layer=3)
    direction.save(tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", mode="add", scale=-0.5)
    (tensor,) = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    assert tensor.name == "direction.2"  # the output of block 2 is the input of block 3
    vector = torch.tensor(tensor.data)
    expected = logits_as_llama_cpp(model, {2: lambda h: h + vector})
    check_patched(model, [rk.Add(direction, coefficient=-0.5, block_input=3)], expected)


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_a_projection_acts_where_glp_has_it(tmp_path: Path, alpha: float) -> None:
    model = tiny_model(num_hidden_layers=LAYERS)
    direction = random_direction(layer=None)
    direction.save(tmp_path / "a.safetensors")
    target = tmp_path / "a.glp.gguf"
    convert(tmp_path / "a.safetensors", target, mode="ablate", layers=(2, 4, 5), scale=alpha)
    reader = gguf.GGUFReader(target)
    assert [tensor.name for tensor in reader.tensors] == [f"direction.{n}" for n in (1, 3, 4)]
    d = torch.tensor(reader.tensors[0].data)
    assert torch.equal(d, direction.unit)  # the strength is no part of the data

    def project(h: torch.Tensor) -> torch.Tensor:
        return h - alpha * (h @ d).unsqueeze(-1) * d

    expected = logits_as_llama_cpp(model, dict.fromkeys((1, 3, 4), project))
    vector = ControlVector.load(target)
    assert vector.mode == "ablate" and vector.strengths == (alpha,) * 3
    check_patched(model, vector.interventions(LAYERS), expected)


def test_a_basis_with_its_own_strengths(tmp_path: Path) -> None:
    basis = torch.linalg.qr(torch.randn(HIDDEN, 2))[0].T
    rows = {"direction.1": basis[0], "direction.1.1": basis[1]}
    rows |= {"direction.2": basis[1], "direction.2.1": basis[0]}
    path = write(
        tmp_path / "a.gguf",
        {name: row.contiguous().numpy() for name, row in rows.items()},
        **{"glp__mode": "project", "glp__spec_version": 2, "glp__rank": 2},
        **{"glp__orthonormal": True, "glp__alpha_default": 2.0, "glp__hook_point": SITE},
        **{"glp__dir_scales": "1.0, 0.5", "glp__layer_scales": "2:3"},
    )
    vector = ControlVector.load(path)
    assert vector.layers == [2, 3] and vector.strengths == (2.0, 1.0, 6.0, 3.0)
    model = tiny_model(num_hidden_layers=LAYERS)

    def project(one: int, other: int, a: float, b: float) -> Any:
        u, v = basis[one], basis[other]
        return lambda h: h - a * (h @ u).unsqueeze(-1) * u - b * (h @ v).unsqueeze(-1) * v

    edits = {1: project(0, 1, 2.0, 1.0), 2: project(1, 0, 6.0, 3.0)}
    check_patched(model, vector.interventions(LAYERS), logits_as_llama_cpp(model, edits))
    refused("not written", vector.save, tmp_path / "b.glp.gguf", glp=True)
    refused("2 directions at layers", convert, path, tmp_path / "b.safetensors", layers=(2,))


def test_glp_says_what_its_specification_asks_for(tmp_path: Path) -> None:
    direction = random_direction()
    direction.save(tmp_path / "a.safetensors")
    convert(
        tmp_path / "a.safetensors", tmp_path / "a.glp", mode="ablate", layers=(2, 3), model_hint="x"
    )
    reader = gguf.GGUFReader(tmp_path / "a.glp")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "x",
        "controlvector.layer_count": 2,
        "general.base_model.0.name": "org/model[/b]",
        "glp.mode": "project",
        "glp.spec_version": 1,
        "glp.alpha_default": 1.0,
        "glp.rank": 1,
        "glp.orthonormal": True,
        "glp.hook_point": "residual_stream_post_layer",
        "glp.layer_ids_zero_based": "1,2",
        "glp.content_sha256": hashlib.sha256(direction.unit.numpy().tobytes() * 2).hexdigest(),
    }
    assert expected.items() <= keys.items()
    # written again, the same bytes
    before = (tmp_path / "a.glp").read_bytes()
    ControlVector.load(tmp_path / "a.glp").save(tmp_path / "b.glp", glp=True)
    assert (tmp_path / "b.glp").read_bytes() == before


def test_round_trips(tmp_path: Path) -> None:
    direction = random_direction()
    direction.save(tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "a.gguf", mode="add")
    convert(tmp_path / "a.gguf", tmp_path / "b.glp.gguf")  # it says add, so GLP does too
    back = convert(tmp_path / "b.glp.gguf", tmp_path / "b.safetensors")
    assert isinstance(back, Direction) and torch.equal(back.vector, direction.vector)
    loaded = Direction.load(tmp_path / "b.safetensors")
    assert torch.equal(loaded.vector, direction.vector)
    assert (loaded.layer, loaded.model) == (3, "org/model[/b]")
    assert loaded.metadata == {"mode": "add", "strength": "1.0"}
    # one of several
    rows = {n: random_direction(seed=n).vector for n in (1, 2, 3)}
    path = write(tmp_path / "c.gguf", numpy(rows))
    one = convert(path, tmp_path / "c.safetensors", layers=(3,))
    assert isinstance(one, Direction) and one.layer == 3 and torch.equal(one.vector, rows[2])
    some = convert(path, tmp_path / "d.gguf", layers=(2, 4), scale=2.0)
    assert isinstance(some, ControlVector) and some.layers == [2, 4]
    again = ControlVector.load(tmp_path / "d.gguf")
    for direction, block in zip(again.directions, (1, 3), strict=True):
        assert torch.equal(direction.vector, 2 * rows[block])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_what_a_format_can_not_say_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    random_direction().save(source)
    target = tmp_path / "b.gguf"
    refused("can only add", convert, source, target, mode="ablate", layers=(3,))
    refused("--as add, or --as ablate", convert, source, target)
    refused("at every residual add", convert, source, tmp_path / "b.glp", mode="ablate")
    for layer in (0, 1):
        refused("expected 2 or more", convert, source, target, mode="add", layers=(layer,))
    random_direction(layer=None).save(tmp_path / "nowhere.safetensors")
    refused("which blocks", convert, tmp_path / "nowhere.safetensors", target, mode="add")
    refused("no known format|cannot be written", convert, source, tmp_path / "b.pt")
    refused("no known format", convert, tmp_path / "a.bin", target)
    refused("for .gguf alone", convert, source, tmp_path / "b.safetensors", mode="add")
    refused("layer 3, not at 5", convert, source, tmp_path / "b.safetensors", layers=(5,))
    refused("no layer|at which position", convert, source, target, mode="add", position=-1)
    for scale in (0.0, 1e300, float("nan")):
        refused("finite", convert, source, target, mode="add", scale=scale)
    convert(source, tmp_path / "p.glp.gguf", mode="ablate", layers=(2, 3))
    refused("can only add", convert, tmp_path / "p.glp.gguf", target)
    refused(
        "made to ablate; expected --as ablate", convert, tmp_path / "p.glp.gguf", target, mode="add"
    )
    refused("2 directions", convert, tmp_path / "p.glp.gguf", tmp_path / "b.safetensors")
    refused("no layer 9", convert, tmp_path / "p.glp.gguf", tmp_path / "b.glp", layers=(9,))
    vector = ControlVector.load(tmp_path / "p.glp.gguf")
    refused("has 2 blocks", vector.interventions, 2)
    assert not target.exists() and not (tmp_path / "b.safetensors").exists()


ONE = {"direction.1": UNIT[0]}
TWO = {"direction.1": UNIT[0], "direction.1.1": UNIT[1]}
RANK_2 = {"glp__rank": 2, "glp__spec_version": 2}


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        ({}, {}, "behind the file"),
        ({"direction.0": UNIT[0]}, {}, r"direction\.0"),
        ({"direction.01": UNIT[0]}, {}, r"direction\.01"),
        ({"direction.-1": UNIT[0]}, {}, "direction.-1"),
        ({"blk.1.weight": UNIT[0]}, {}, "blk.1.weight"),
        (TWO, {}, "several directions per layer"),
        ({"direction.1": UNIT[0], "direction.2": UNIT[1][:8]}, {}, "different hidden sizes"),
        ({"direction.1": torch.zeros(8)}, {}, "one at least"),
        ({"direction.1": torch.full((8,), torch.nan)}, {}, "NaN"),
        ({"direction.1": np.ones(8, dtype=np.float16)}, {}, "expected float32"),
        ({"direction.1": torch.ones(2, 4)}, {}, "2 dimensions"),
        (ONE, {"architecture": "llama"}, "architecture is 'llama'"),
        (ONE, {"dspark__mode": "project"}, "before GLP"),
        (ONE, {**PROJECT, "glp__mode": "ablate"}, "glp.mode is 'ablate'"),
        (ONE, {**PROJECT, "glp__mode": 1}, "glp.mode is 1"),
        (ONE, {**PROJECT, "glp__spec_version": 3}, "spec_version is 3"),
        (ONE, {**PROJECT, "glp__hook_point": "ffn_out_pre_residual"}, "ffn_out_pre_residual"),
        ({"direction.1": 2 * UNIT[0]}, PROJECT, "not orthonormal"),
        ({"direction.1": torch.zeros(8)}, PROJECT, "not orthonormal"),
        (ONE, {**PROJECT, "glp__alpha_default": float("inf")}, "finite"),
        (ONE, {**PROJECT, "glp__layer_ids_zero_based": "2"}, "zero_based"),
        (ONE, {**PROJECT, "glp__content_sha256": "0" * 64}, "damaged"),
        (ONE, {**PROJECT, "glp__rank": 2}, "glp.rank is 2"),
        (ONE, {**PROJECT, "glp__rank": 4_000_000_000}, "glp.rank is 4"),
        (ONE, {**PROJECT, "glp__dir_scales": "1"}, "spec_version 2"),
        (TWO, {**PROJECT, "glp__rank": 2}, "spec_version 2"),
        (TWO, {**PROJECT, **RANK_2}, "without glp.orthonormal"),
        ({"direction.1": UNIT[0], "direction.1.1": UNIT[0]},
         {**PROJECT, **RANK_2, "glp__orthonormal": True}, "not orthonormal"),
        (ONE, {**PROJECT, "glp__spec_version": 2, "glp__layer_scales": "7:1"}, "layer_scales"),
        (ONE, {**PROJECT, "glp__spec_version": 2, "glp__dir_scales": "1,1"}, "dir_scales"),
        (ONE, {"glp__mode": "add", "glp__alpha_default": 4.0}, "its own"),
    ],
)  # fmt: skip
def test_control_vectors_that_can_not_be_followed_are_refused(
    tmp_path: Path, tensors: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.gguf", {k: np.asarray(v) for k, v in tensors.items()}, **keys)
    refused(message, ControlVector.load, path)
    refused("a.gguf", ControlVector.load, path)


# The paper's repository


def test_the_papers_files_are_read(tmp_path: Path) -> None:
    candidates = torch.randn(5, 8, HIDDEN, dtype=torch.float64)
    torch.save(candidates, tmp_path / "mean_diffs.pt")
    torch.save(candidates[-2, 3], tmp_path / "direction.pt")  # a view: its whole storage is saved
    assert (tmp_path / "direction.pt").stat().st_size > candidates.nbytes
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -2, "layer": 3}))
    direction = read(tmp_path / "direction.pt")
    assert isinstance(direction, Direction)
    assert torch.equal(direction.vector, candidates[-2, 3].float())
    assert (direction.layer, direction.position) == (3, -2)
    direction.save(tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < 1000

    several = read(tmp_path / "mean_diffs.pt")
    assert isinstance(several, Candidates) and torch.equal(several.vectors, candidates.float())
    convert(tmp_path / "mean_diffs.pt", tmp_path / "candidates.safetensors")
    for source in ("mean_diffs.pt", "candidates.safetensors"):
        target = tmp_path / f"{source}.safetensors"
        convert(tmp_path / source, target, layers=(3,), position=-2)
        again = Direction.load(target)
        assert torch.equal(again.vector, direction.vector)
        assert (again.layer, again.position) == (3, -2)
    for wrong in ({"layers": (3,)}, {"position": -1}, {"layers": (3, 4), "position": -1},
                  {"layers": (8,), "position": -1}, {"layers": (3,), "position": -6},
                  {"layers": (3,), "position": 0}):  # fmt: skip
        refused("layer", convert, tmp_path / "mean_diffs.pt", tmp_path / "no.safetensors", **wrong)
    assert not (tmp_path / "no.safetensors").exists()


def test_where_a_direction_was_read_can_be_said_if_the_file_does_not(tmp_path: Path) -> None:
    torch.save(torch.randn(8), tmp_path / "direction.pt")
    assert read(tmp_path / "direction.pt").layer is None  # type: ignore[union-attr]
    named = convert(tmp_path / "direction.pt", tmp_path / "a.safetensors", layers=(4,), position=-1)
    assert isinstance(named, Direction) and (named.layer, named.position) == (4, -1)
    for text in ('{"pos": -2}', "[]", '{"pos": 0, "layer": 3}', '{"pos": -1, "layer": true}', "{"):
        (tmp_path / "direction_metadata.json").write_text(text)
        refused("direction", read, tmp_path / "direction.pt")


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(1.0), torch.zeros(4), torch.ones(2, 2), torch.ones(0), torch.arange(3),
     torch.full((3,), torch.nan), torch.ones(4).expand(3, 4), torch.ones(1).expand(1000)],
)  # fmt: skip
def test_other_tensors_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save(tensor, tmp_path / "direction.pt")
    refused("direction.pt", read, tmp_path / "direction.pt")


def test_candidates_of_another_shape_are_refused(tmp_path: Path) -> None:
    for tensor in (torch.ones(3, 4), torch.ones(1, 0, 4), torch.ones(1, 2, 3).int()):
        write_tensors(tmp_path / "a.safetensors", CANDIDATES, {"candidates": tensor}, {})
        refused("expected floating point", read, tmp_path / "a.safetensors")
