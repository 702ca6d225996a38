"""Extraction and selection on SmolLM2 against what the paper's own code computed (golden/)."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import refusal_kernels as rk
from refusal_kernels.hf import embedded

GOLDEN = Path(__file__).parent / "golden"
PRUNED = 24  # of 30 layers: from here on the paper discards the candidates


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "paper_smollm2.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[str]]:
    return json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    try:
        embedded.smollm2_folder()
    except rk.InputError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    return rk.load("smollm2", "cpu")


@pytest.mark.full
def test_mean_differences(loaded: Any, golden: Any, prompts: Any) -> None:
    found = rk.mean_difference(*loaded, prompts["a"], prompts["b"]).vectors.double()
    expected = torch.from_numpy(golden["mean_diffs"]).double()
    assert found.shape == expected.shape == (6, 30, 576)
    norms = expected.norm(dim=-1)
    apart = (found - expected).norm(dim=-1)
    assert (norms[:, 0] == 0).all() and (apart[:, 0] <= 1e-6).all()
    assert float((apart[:, 1:] / norms[:, 1:]).max()) <= 1e-4


@pytest.mark.full
def test_selection_scores_and_winner(loaded: Any, golden: Any, prompts: Any) -> None:
    places = list(zip(golden["position"].tolist(), golden["layer"].tolist(), strict=True))
    vectors = torch.zeros(golden["mean_diffs"].shape)
    for position, layer in places:
        vectors[position, layer] = torch.from_numpy(golden["mean_diffs"][position, layer])
    selection = rk.select(
        *loaded, rk.Candidates(vectors), prompts["score_a"], prompts["score_b"],
        refusal_tokens=golden["refusal_tokens"].tolist(),
        kl_threshold=torch.inf, induce_threshold=-torch.inf, prune_last=0.0,
    )  # fmt: skip
    assert selection.unmodified_harmful == pytest.approx(golden["baseline_a"].mean(), abs=5e-5)
    assert selection.unmodified_harmless == pytest.approx(golden["baseline_b"].mean(), abs=5e-5)

    scored = {(row.position, row.layer): row for row in selection.candidates}
    measured = {at: number for number, at in enumerate(places) if at[1] > 0}
    assert {at for at, row in scored.items() if row.kl is not None} == set(measured)
    for at, number in measured.items():
        assert scored[at].bypass == pytest.approx(golden["bypass"][number], abs=5e-5), at
        assert scored[at].induce == pytest.approx(golden["induce"][number], abs=5e-5), at
        assert scored[at].kl == pytest.approx(golden["kl"][number], abs=2e-5), at

    def winner(bypass: Any, layers: int) -> tuple[int, int]:
        return min((at for at in measured if at[1] < layers), key=bypass)

    for layers in (30, PRUNED):
        theirs = winner(lambda at: golden["bypass"][measured[at]], layers)
        assert winner(lambda at: scored[at].bypass, layers) == theirs
    assert theirs == (-1, 18)
