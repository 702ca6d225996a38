"""Streaming moments against plain float64 sums over everything at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.research.extraction.moments import Moments

LAYERS, POSITIONS = 2, 3
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_batches(
    hidden: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[list[Batch]]:
    """Per layer, batches of odd sizes; what must not be read is NaN."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(LAYERS):
        batches = []
        for batch, tokens in ((1, 3), (5, 7), (2, 4), (6, 3)):
            x = torch.randn(batch, tokens, hidden, generator=generator) * 3 + 10
            index = torch.full((batch, tokens), -1, dtype=torch.int32)
            index[:, -POSITIONS:] = torch.arange(POSITIONS, dtype=torch.int32)
            index[-1, -POSITIONS] = -1  # a short prompt
            group = torch.arange(batch, dtype=torch.int32) % 3 - 1  # -1: not read
            x[(index < 0) | (group < 0).unsqueeze(-1)] = float("nan")
            batches.append((x.to(dtype), index, group))
        layers.append(batches)
    return layers


def feed(moments: Moments, layers: list[list[Batch]]) -> Moments:
    for layer, batches in enumerate(layers):
        for batch in batches:
            moments.update(layer, *batch)
    return moments


def rows_of(batches: list[Batch], group: int, position: int) -> torch.Tensor:
    """All rows that feed one slot, float64 [n, hidden]: the plain way."""
    found = [
        x[b, t].double()
        for x, index, groups in batches
        for b in range(x.shape[0])
        for t in range(x.shape[1])
        if int(groups[b]) == group and int(index[b, t]) == position
    ]
    return torch.stack(found)


def state(moments: Moments) -> list[torch.Tensor]:
    return [read(g) for g in moments.groups for read in (moments.count, moments.mean)] + [
        moments.variance(g) for g in moments.groups
    ]


@pytest.mark.parametrize("hidden", [1, 111, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_those_of_all_rows_at_once(hidden: int, dtype: torch.dtype) -> None:
    layers = make_batches(hidden, dtype=dtype)
    moments = feed(Moments(LAYERS, POSITIONS, hidden), layers)
    for layer in range(LAYERS):
        for g, name in enumerate(moments.groups):
            for position in range(POSITIONS):
                rows = rows_of(layers[layer], g, position)
                assert moments.count(name)[layer, position] == len(rows)
                mean, variance = moments.mean(name), moments.variance(name)
                assert mean.dtype == variance.dtype == torch.float64
                assert mean.shape == (LAYERS, POSITIONS, hidden)
                # float64 sums of a few rows: some hundred ulps of the magnitude (10, and 9)
                torch.testing.assert_close(mean[layer, position], rows.mean(0), rtol=0, atol=1e-12)
                torch.testing.assert_close(
                    variance[layer, position], rows.var(0, correction=0), rtol=0, atol=1e-11
                )


def test_summary_is_the_definition_written_out() -> None:
    layers = make_batches(20)
    summary = feed(Moments(LAYERS, POSITIONS, 20), layers).compute()
    assert summary.mean_difference.shape == (POSITIONS, LAYERS, 20)
    assert summary.cosine.shape == (POSITIONS, LAYERS, LAYERS)
    for position in range(POSITIONS):
        differences = []
        for layer in range(LAYERS):
            a, b = (rows_of(layers[layer], g, position) for g in (0, 1))
            difference = a.mean(0) - b.mean(0)
            differences.append(difference)
            pooled = (a.var(0, correction=0) + b.var(0, correction=0)) / 2
            d_prime = (difference / pooled.sqrt()).pow(2).mean().sqrt()
            torch.testing.assert_close(
                summary.mean_difference[position, layer], difference, rtol=0, atol=1e-12
            )
            torch.testing.assert_close(summary.d_prime[position, layer], d_prime)
            torch.testing.assert_close(
                summary.variance["harmful"][position, layer], a.var(0, correction=0)
            )
        cosine = torch.cosine_similarity(differences[0], differences[1], dim=0)
        torch.testing.assert_close(summary.cosine[position, 0, 1], cosine)
        torch.testing.assert_close(summary.cosine[position].diagonal().sum().item(), 2.0)


def test_channels_that_never_move_separate_nothing() -> None:
    constant = torch.full((4, 1, 3), 0.1)
    constant[..., 2] = 0.0
    index = torch.zeros(4, 1, dtype=torch.int32)
    moments = Moments(1, 1, 3)
    for group in (0, 1):
        moments.update(0, constant, index, torch.full((4,), group, dtype=torch.int32))
    summary = moments.compute()
    assert summary.d_prime.tolist() == [[0.0]]
    assert summary.cosine.tolist() == [[[0.0]]]


def test_merging_parts_is_one_pass() -> None:
    layers = make_batches(33)
    whole = feed(Moments(LAYERS, POSITIONS, 33), layers)
    first = feed(Moments(LAYERS, POSITIONS, 33), [batches[:1] for batches in layers])
    second = feed(Moments(LAYERS, POSITIONS, 33), [batches[1:] for batches in layers])
    assert first.merge(second) is first
    for merged, expected in zip(state(first), state(whole), strict=True):
        torch.testing.assert_close(merged, expected, rtol=1e-13, atol=1e-13)

    empty = Moments(LAYERS, POSITIONS, 33)
    for merged, expected in zip(state(empty.merge(whole)), state(whole), strict=True):
        assert torch.equal(merged, expected)  # nothing plus something is that, to the bit
    before = state(whole)
    whole.merge(Moments(LAYERS, POSITIONS, 33))
    assert all(map(torch.equal, state(whole), before))


def test_folding_batches_is_merging_them() -> None:
    """Batch by batch through a state that is cleared: the bits of the batch, and of any merge."""
    layers = make_batches(33)
    whole = feed(Moments(LAYERS, POSITIONS, 33), layers)
    folded, merged = (Moments(LAYERS, POSITIONS, 33) for _ in range(2))
    batch = Moments(LAYERS, POSITIONS, 33, ("batch",))
    for number in range(len(layers[0])):
        alone = Moments(LAYERS, POSITIONS, 33)
        for layer, batches in enumerate(layers):
            alone.update(layer, *batches[number])
        merged.merge(alone)
        for group in (0, 1):
            batch.clear()
            for layer, batches in enumerate(layers):
                x, index, groups = batches[number]
                batch.update(layer, x, index, torch.where(groups == group, 0, -1))
            folded.fold(group, batch.tensors)
    assert all(map(torch.equal, state(folded), state(merged)))
    for found, expected in zip(state(folded), state(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    for group, tensors in ((2, batch.tensors), (0, folded.tensors)):
        with pytest.raises(InputError, match="does not fold"):
            whole.fold(group, tensors)


def test_a_run_resumed_from_a_file_ends_in_the_same_bits(tmp_path: Path) -> None:
    layers = make_batches(64)
    whole = feed(Moments(LAYERS, POSITIONS, 64, ("a", "b")), layers)
    half = feed(Moments(LAYERS, POSITIONS, 64, ("a", "b")), [batches[:2] for batches in layers])
    half.metadata["cursor"] = "2"
    half.save(tmp_path / "moments.safetensors")
    resumed = Moments.load(tmp_path / "moments.safetensors")
    assert resumed.groups == ("a", "b") and resumed.metadata == {"cursor": "2"}
    feed(resumed, [batches[2:] for batches in layers])
    assert all(map(torch.equal, state(resumed), state(whole)))


def test_bad_numbers_are_named(tmp_path: Path) -> None:
    index = torch.arange(POSITIONS, dtype=torch.int32).unsqueeze(0)
    for poison in (float("nan"), float("inf")):
        moments = Moments(LAYERS, POSITIONS, 4)
        for layer in range(LAYERS):
            for group in (0, 1):
                x = torch.ones(1, POSITIONS, 4)
                if (layer, group) == (1, 1):
                    x[0, 1, 2] = poison
                moments.update(layer, x, index, torch.tensor([group]))
        with pytest.raises(InputError, match=r"'harmless' met NaN .* layer 1, position -2"):
            moments.compute()
    moments = Moments(1, POSITIONS, 4)
    moments.update(0, torch.ones(1, POSITIONS, 4), index, torch.tensor([0]))
    with pytest.raises(InputError, match=r"'harmless' saw no token at layer 0, position -3"):
        moments.compute()
    with pytest.raises(InputError, match="expected two"):
        Moments(1, 1, 1, ("one",)).compute()


@pytest.mark.parametrize(
    ("layer", "x", "index", "group"),
    [
        (2, (1, 3, 4), (1, 3), (1,)),
        (-1, (1, 3, 4), (1, 3), (1,)),
        (0, (1, 3, 5), (1, 3), (1,)),
        (0, (3, 4), (1, 3), (1,)),
        (0, (1, 3, 4), (1, 2), (1,)),
        (0, (1, 3, 4), (1, 3), (2,)),
    ],
)
def test_bad_updates_are_refused(layer: int, x: Any, index: Any, group: Any) -> None:
    moments = Moments(LAYERS, POSITIONS, 4)
    with pytest.raises(InputError):
        moments.update(
            layer, torch.ones(x), torch.zeros(index).int(), torch.zeros(group, dtype=torch.int32)
        )
    assert not moments.count("harmful").any()


def test_bad_shapes_names_and_files_are_refused(tmp_path: Path) -> None:
    for shape, words in (((0, 1, 1), "1 or more"), ((1, 1, 1, ("a", "a")), "different names")):
        with pytest.raises(InputError, match=words):
            Moments(*shape)
    for other in (Moments(1, 1, 5), Moments(1, 1, 4, ("a", "b"))):
        with pytest.raises(InputError, match="do not merge"):
            Moments(1, 1, 4).merge(other)
    with pytest.raises(InputError, match="no group 'x'"):
        Moments(1, 1, 4).mean("x")

    path = tmp_path / "moments.safetensors"
    Direction(torch.ones(4)).save(path)
    with pytest.raises(InputError, match=r"holds refusal_kernels\.direction version 1"):
        Moments.load(path)
    Moments(1, 1, 4).save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="damaged"):
        Moments.load(path)
    Moments(1, 1, 4).save(path)
    tensors = {**load_file(path), "m2": torch.zeros(1, 2, 1, 5)}
    known = {"format": "refusal_kernels.moments", "format_version": "1"}
    save_file(tensors, path, metadata={**known, "groups": '["a", "b"]', "metadata": "{}"})
    with pytest.raises(InputError, match="no whole"):
        Moments.load(path)
