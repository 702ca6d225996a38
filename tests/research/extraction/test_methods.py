"""The methods find a direction that was planted, and give candidates that can be compared."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run_command, tiny_model, tiny_tokenizer

from refusal_kernels.direction import Candidates, Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.convert import read
from refusal_kernels.research.extraction.collect import mean_difference
from refusal_kernels.research.extraction.methods import (
    METHODS,
    find_candidates,
    leace_vector,
    pca_vector,
    probe_vector,
    winsorized,
)

WORDS = "cake storm spell tea box boat lamp paint fix tell me please now be kind brief".split()
HARMFUL = [f"curse the {a} {b}" for a in WORDS[:8] for b in WORDS[8:14]]
HARMLESS = [f"make a {a} {b}" for a in WORDS[:8] for b in WORDS[8:13]]
LAYER = 2


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1))


def drawn(n: int, d: int, scales: torch.Tensor, planted: torch.Tensor, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    two = torch.randn(2, n, d, dtype=torch.float64, generator=generator) * scales + 3.0
    return two[0] + planted, two[1]


@pytest.mark.parametrize("fit", [leace_vector, pca_vector, probe_vector])
def test_a_planted_vector_is_found_among_isotropic_noise(fit: Any) -> None:
    planted = 4 * torch.nn.functional.normalize(torch.arange(1.0, 17.0, dtype=torch.float64), dim=0)
    harmful, harmless = drawn(4000, 16, torch.ones(16, dtype=torch.float64), planted, 0)
    vector = fit(harmful, harmless)
    assert vector.shape == (16,) and abs(cosine(vector, planted)) > 0.99


def test_each_method_is_what_it_says() -> None:
    planted = torch.zeros(12, dtype=torch.float64)
    planted[0] = planted[6] = 1.0
    scales = torch.logspace(0, 1, 12, dtype=torch.float64)
    harmful, harmless = drawn(20000, 12, scales, planted, 1)
    # LEACE reads along covariance^-1 (mean difference): quiet dimensions count more
    covariance = torch.cov(torch.cat([harmful, harmless]).T)
    discriminant = torch.linalg.solve(covariance, harmful.mean(0) - harmless.mean(0))
    assert abs(cosine(leace_vector(harmful, harmless), discriminant)) > 0.9999
    assert abs(cosine(leace_vector(harmful, harmless), planted)) < 0.97
    # PCA takes the loudest dimension of the differences, whatever their mean is
    assert abs(float(pca_vector(harmful, harmless)[-1])) > 0.99
    # a probe separates the classes as well as the discriminant does
    probe = probe_vector(harmful, harmless)
    assert abs(cosine(probe, discriminant)) > 0.99


@pytest.fixture(scope="module")
def planted() -> torch.Tensor:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(3))
    return 100 * vector / vector.norm()


@pytest.fixture(scope="module")
def model(planted: torch.Tensor) -> Iterator[Any]:
    """A tiny model that writes a vector into the stream where a prompt says "curse"."""
    model = tiny_model("qwen2", num_hidden_layers=4)
    curse = tiny_tokenizer().convert_tokens_to_ids("curse")
    rows: list[torch.Tensor] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        rows[:] = [(kwargs["input_ids"] == curse).any(dim=1)]

    def write(_: Any, args: Any) -> Any:
        return (args[0] + rows[0][:, None, None] * planted, *args[1:])

    hooks = [
        model.model.register_forward_pre_hook(look, with_kwargs=True),
        model.model.layers[LAYER].register_forward_pre_hook(write),
    ]
    yield model
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_found_in_a_model(
    model: Any, planted: torch.Tensor, method: str
) -> None:
    calls: list[tuple[int, int]] = []
    candidates = find_candidates(
        model, tiny_tokenizer(), HARMFUL, HARMLESS, method=method, batch_size=7,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert candidates.method == method and candidates.template is not None
    found = candidates.vectors
    assert found.shape == (4, 4, 64) and found.dtype == torch.float32
    plain = mean_difference(model, tiny_tokenizer(), HARMFUL, HARMLESS)
    means = plain.vectors
    for mean, other in zip(candidates.means, plain.means, strict=True):
        torch.testing.assert_close(mean, other, rtol=1e-5, atol=1e-5)
    for position in range(4):
        assert cosine(found[position, LAYER], planted) > (0.8 if method == "leace" else 0.97)
    assert not found[:, 0].any()  # the template's embeddings do not depend on the prompt
    # the candidate is the mean difference's component along its own vector: toward the harmful
    for c, mean in zip(found[:, 1:].flatten(0, 1), means[:, 1:].flatten(0, 1), strict=True):
        unit = c.double() / c.double().norm()
        assert float(unit @ mean.double()) == pytest.approx(float(c.double().norm()), rel=1e-4)
    assert calls[-1] == (88, 88) and [done for done, _ in calls] == sorted({d for d, _ in calls})
    again = find_candidates(model, tiny_tokenizer(), HARMFUL, HARMLESS, method=method, batch_size=7)
    assert torch.equal(found, again.vectors)


def test_the_default_is_the_mean_difference(model: Any) -> None:
    expected = mean_difference(model, tiny_tokenizer(), HARMFUL, HARMLESS, batch_size=5)
    default = find_candidates(model, tiny_tokenizer(), HARMFUL, HARMLESS, batch_size=5)
    assert torch.equal(default.vectors, expected.vectors) and default.method == "mean_difference"


def test_the_first_layers_and_positions_alone(model: Any) -> None:
    options: dict[str, Any] = {"method": "pca", "batch_size": 7}
    every = find_candidates(model, tiny_tokenizer(), HARMFUL, HARMLESS, **options)
    part = find_candidates(
        model, tiny_tokenizer(), HARMFUL, HARMLESS, positions=2, last_layer=2, **options
    )
    assert torch.equal(part.vectors, every.vectors[-2:, :3])


def test_winsorized_rows_are_clamped_by_their_own_quantile() -> None:
    rows = torch.arange(1.0, 12.0, dtype=torch.float64).repeat(2, 1)
    rows[1] *= -10
    expected = rows.clone()
    expected[0, -1], expected[1, -1] = 10.0, -100.0  # 0.9 of the way from 1 to 11 is 10
    torch.testing.assert_close(winsorized(rows, 0.9), expected)


def test_a_massive_channel_does_not_hide_a_planted_direction() -> None:
    planted = torch.zeros(400, dtype=torch.float64)
    planted[:40] = 1.0
    harmful, harmless = drawn(500, 400, torch.ones(400, dtype=torch.float64), planted, 2)
    for seed, rows in enumerate((harmful, harmless)):
        generator = torch.Generator().manual_seed(seed)
        rows[:, 399] = 3000 + 300 * torch.randn(500, dtype=torch.float64, generator=generator)
    plain = harmful.mean(0) - harmless.mean(0)
    clamped = winsorized(harmful, 0.995).mean(0) - winsorized(harmless, 0.995).mean(0)
    assert cosine(plain, planted) < 0.6 and cosine(clamped, planted) > 0.9


def test_winsorized_candidates(model: Any) -> None:
    options: dict[str, Any] = {"batch_size": 7}
    whole = find_candidates(model, tiny_tokenizer(), HARMFUL, HARMLESS, **options).vectors
    least = find_candidates(
        model, tiny_tokenizer(), HARMFUL, HARMLESS, winsorize=1 - 1e-12, **options
    )
    torch.testing.assert_close(least.vectors, whole, rtol=1e-4, atol=1e-4)
    most = find_candidates(model, tiny_tokenizer(), HARMFUL, HARMLESS, winsorize=0.5, **options)
    assert most.method == "mean_difference, winsorized at 0.5"
    assert not torch.allclose(most.vectors, whole, rtol=0.1)


def test_bad_input(model: Any, monkeypatch: Any) -> None:
    arguments = model, tiny_tokenizer(), HARMFUL, HARMLESS
    with pytest.raises(InputError, match=r"winsorize is 1\.0; expected a quantile above 0"):
        find_candidates(*arguments, winsorize=1.0)
    with pytest.raises(InputError, match="'lda'; expected one of mean_difference, leace, pca"):
        find_candidates(*arguments, method="lda")
    for last in (-1, 4):
        with pytest.raises(InputError, match=f"last layer is {last}; expected 0 to 3"):
            find_candidates(*arguments, method="pca", last_layer=last)
    with pytest.raises(InputError, match="fewer tokens than the 30 positions"):
        find_candidates(*arguments, method="pca", positions=30)
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.model.layers[1].mlp.down_proj.weight, torch.nan)
    for options in ({"method": "pca"}, {"winsorize": 0.9}):
        with pytest.raises(InputError, match="'harmful' met NaN or infinity at layer 2, position"):
            find_candidates(broken, *arguments[1:], **options)
    for method, module, library in (
        ("leace", "concept_erasure", "concept-erasure"),
        ("probe", "sklearn", "scikit-learn"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=rf"{library}; expected pip install .*\[research\]"):
            find_candidates(*arguments, method=method)


def test_the_command_line_keeps_the_method(tmp_path: Path, monkeypatch: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, prompts in (("harmful", HARMFUL), ("harmless", HARMLESS)):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
    common = [
        *("--model", tmp_path / "model"),
        *("--harmful", tmp_path / "harmful.txt", "--harmless", tmp_path / "harmless.txt"),
    ]

    file, out = tmp_path / "candidates.safetensors", tmp_path / "direction.safetensors"
    assert run_command("extract", *common, "--away-from", "harmless", "--out", file) == 0
    loaded = Candidates.load(file)
    assert loaded.method == "mean_difference, away from harmless"
    assert ((loaded.vectors * loaded.means.harmless).sum(-1).abs() < 1e-4).all()
    assert run_command("extract", *common, "--method", "probe", "--out", file) == 0
    loaded = Candidates.load(file)
    assert loaded.method == "probe" and loaded.vectors.shape == (4, 3, 64)
    monkeypatch.setattr(
        "refusal_kernels.research.selection.algorithm._judged",
        lambda at, scores, *_: kept(at, scores),
    )
    assert (
        run_command(
            "select", *common, "--candidates", file, "--out", out, "--refusal-tokens", "7,9"
        )
        == 0
    )
    direction = Direction.load(out)
    assert direction.method == "probe"
    assert torch.equal(direction.vector, loaded.vectors[direction.position, direction.layer])
    candidates = read(file)
    assert isinstance(candidates, Candidates)
    assert candidates.at(direction.layer, direction.position).method == "probe"
    candidates.save(tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == file.read_bytes()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part*"))


def kept(at: tuple[int, int], scores: list[float]) -> Any:
    """A candidate that no threshold discards: a random model refuses nothing."""
    from refusal_kernels.research.selection.algorithm import ScoredCandidate

    return ScoredCandidate(*at, *scores, None)
