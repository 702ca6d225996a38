"""A direction, and what can be wrong with one or with its file."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from refusal_kernels.direction import Candidates, Direction, Means
from refusal_kernels.errors import InputError

VECTOR = torch.tensor([3.0, 0.0, -4.0])


def test_norm_and_unit() -> None:
    direction = Direction(VECTOR)
    assert direction.hidden == 3 and direction.norm == 5.0
    assert direction.unit.dtype == torch.float32
    assert torch.equal(direction.unit, torch.tensor([0.6, 0.0, -0.8]))
    assert direction.method == "mean_difference"


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_unit_is_rounded_once_from_float64(scale: float) -> None:
    # in float32 the squares of 1e30 overflow, and those of 1e-30 vanish
    vector = torch.randn(501, generator=torch.Generator().manual_seed(0)) * scale
    expected = vector.double() / vector.double().pow(2).sum().sqrt()
    assert torch.equal(Direction(vector).unit, expected.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_vector_is_an_own_contiguous_float32_copy(dtype: torch.dtype) -> None:
    source = torch.randn(100, 64).to(dtype).requires_grad_()
    column = source[:, 7]
    vector = Direction(column).vector
    expected = column.detach().float().clone()
    with torch.no_grad():
        source.zero_()
    assert torch.equal(vector, expected)
    assert vector.dtype == torch.float32 and vector.is_contiguous() and not vector.requires_grad
    assert vector.untyped_storage().nbytes() == 400


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.zeros(3), "zero"),
        (torch.tensor([1.0, float("nan")]), "NaN or infinity"),
        (torch.tensor([1.0, float("-inf")]), "NaN or infinity"),
        (torch.tensor([1e300], dtype=torch.float64), "NaN or infinity"),  # no float32
        (torch.tensor([1e-300], dtype=torch.float64), "zero"),
        (torch.tensor([1, 2]), "int64"),
        (torch.ones(2, 2), r"\[2, 2\]"),
        (torch.tensor(1.0), "floating-point tensor"),
        (torch.empty(0), "zero"),
        ([1.0, 2.0], "list"),
    ],
)
def test_bad_vectors_are_refused(vector: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Direction(vector)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"layer": -1}, {"position": 0}, {"metadata": {"norm": "1"}}, {"metadata": {"a": 1}}]
)
def test_bad_provenance_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Direction(VECTOR, **wrong)


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    layer=st.none() | st.integers(0, 200),
    position=st.none() | st.integers(-20, -1),
    note=st.text(max_size=20).filter(lambda text: text.isprintable()),
)
def test_round_trip_is_exact(
    tmp_path_factory: Any, values: list[float], layer: int | None, position: int | None, note: str
) -> None:
    vector = torch.tensor(values)
    if not vector.any():
        return
    path = tmp_path_factory.mktemp("direction") / "a.safetensors"
    saved = Direction(vector, "org/model", layer, position, "by hand", {"note": note})
    saved.save(path)
    loaded = Direction.load(path, hidden=len(values))
    assert torch.equal(loaded.vector, vector)
    for name in ("model", "layer", "position", "method", "metadata"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]


def test_the_means_of_both_classes_travel_with_their_vectors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    means = Means(torch.randn(2, 4, 3).half(), torch.randn(2, 4, 3).half())
    candidates = Candidates(torch.randn(2, 4, 3), means=means)
    candidates.save(path)
    loaded = Candidates.load(path)
    for found, mean in zip(loaded.means, means, strict=True):
        assert torch.equal(found, mean.float())
    direction = loaded.at(3, -1)
    direction.save(path)
    for found, mean in zip(Direction.load(path).means, means, strict=True):
        assert torch.equal(found, mean[-1, 3].float())
        assert found.untyped_storage().nbytes() == 12
    Direction(VECTOR).save(path)
    assert Direction.load(path).means is None
    known = {"format": "refusal_kernels.direction", "format_version": "1"}
    wrong = {r"\[2\] or not finite": torch.ones(2), "expected a float": VECTOR.int()}
    for message, mean in wrong.items():
        with pytest.raises(InputError, match=message):
            Direction(VECTOR, means=Means(VECTOR, mean))
        tensors = {"direction": VECTOR, "harmful_mean": VECTOR.clone(), "harmless_mean": mean}
        save_file(tensors, path, metadata=known)
        with pytest.raises(InputError, match=message) as caught:
            Direction.load(path)
        assert str(path) in str(caught.value)


def test_candidates_away_from_the_mean_of_a_class() -> None:
    vectors, harmful, harmless = torch.randn(3, 2, 4, 64).unbind()
    vectors[:, 0] = harmless[:, 0] = 0.0  # at layer 0 nothing depends on the prompt
    candidates = Candidates(vectors, method="by hand", means=Means(harmful, harmless))
    found = candidates.away_from("harmless")
    assert found.method == "by hand, away from harmless" and found.means is not None
    m = harmless[:, 1:].double() / harmless[:, 1:].double().norm(dim=-1, keepdim=True)
    r = vectors[:, 1:].double()
    expected = r - torch.einsum("pld,pld,ple->ple", r, m, m)
    torch.testing.assert_close(found.vectors[:, 1:].double(), expected, atol=1e-6, rtol=0)
    assert ((found.vectors[:, 1:].double() * m).sum(-1).abs() < 1e-6).all()
    assert not found.vectors[:, 0].any()
    assert not torch.allclose(candidates.away_from("harmful").vectors, found.vectors)
    with pytest.raises(InputError, match="away_from is 'all'; expected harmful or harmless"):
        candidates.away_from("all")
    with pytest.raises(InputError, match="carry no mean activations"):
        Candidates(vectors).away_from("harmless")


def test_the_file_can_be_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    Direction(VECTOR, model="m", layer=4, position=-2).save(path)
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["direction"]
        metadata = file.metadata()
    assert metadata.pop("version")
    assert metadata == {
        "format": "refusal_kernels.direction",
        "format_version": "1",
        "model": "m",
        "layer": "4",
        "position": "-2",
        "norm": "5.0",
        "method": "mean_difference",
    }
    # nothing is hidden behind the vector: 3 floats after the header
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert path.stat().st_size == 8 + size + 12
    assert json.loads(path.read_bytes()[8 : 8 + size])["direction"]["dtype"] == "F32"


def _write(path: Path, vector: torch.Tensor, key: str = "direction", **metadata: str) -> None:
    known = {"format": "refusal_kernels.direction", "format_version": "1"}
    save_file({key: vector}, path, metadata={**known, **metadata})


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    good, path = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    Direction(VECTOR).save(good)

    def refused(match: str, hidden: int | None = None) -> None:
        with pytest.raises(InputError, match=match) as caught:
            Direction.load(path, hidden)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    refused("not there")
    path.mkdir()
    refused("not there")
    path.rmdir()
    for content in (b"", b"hello", good.read_bytes()[:-1], b"\xff" * 200):
        path.write_bytes(content)
        refused("damaged")
    save_file({"direction": VECTOR}, path)
    refused("nothing of this package")
    for match, vector, change in (
        ("version 2; expected refusal_kernels.direction", VECTOR, {"format_version": "2"}),
        ("no tensor named 'direction'", VECTOR, {"key": "vector"}),
        ("NaN or infinity", torch.tensor([1.0, float("nan")]), {}),
        ("zero", torch.zeros(3), {}),
        ("int32", VECTOR.int(), {}),
        ("four", VECTOR, {"layer": "four"}),
        ("negative", VECTOR, {"position": "3"}),
    ):
        _write(path, vector, **change)
        refused(match)
    _write(path, VECTOR)
    refused("hidden size 3; the model has 64", hidden=64)


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        Direction(VECTOR).save(tmp_path / "nowhere" / "direction.safetensors")

    path = tmp_path / "direction.safetensors"
    Direction(VECTOR).save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="disk full"):
        Direction(torch.ones(3)).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
