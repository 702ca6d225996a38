"""The benchmark of whole models measures and checks what it says."""

import json
from contextlib import nullcontext

import bench_model
import pytest
from tiny import tiny_model

from refusal_kernels import Ablate, patch


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_model, "MEASURE_S", 0.0)
    tiny_model("qwen2").save_pretrained(tmp_path / "tiny")

    def go(*options):
        rows = bench_model.main(
            [
                *("--models", str(tmp_path / "tiny"), "--dtypes", "float32", "--rounds", "2"),
                *("--seconds", "0", "--threads", "1", "--out", str(tmp_path / "out")),
                *options,
            ]
        )
        return rows, json.loads((tmp_path / "out" / "models-cpu.json").read_text())

    return go


def test_every_method_is_timed_and_right(run):
    rows, document = run()
    assert document["complete"] and len(document["rows"]) == len(rows) == 3 * 4
    for row in document["rows"]:
        assert row["status"] == "ok" and row["tokens_per_second"] > 0 and row["rounds"] == 2
        if row["method"] == "unmodified":
            assert row["ratio"] == 1.0 and row["right"] is None
            assert row["logits_difference"] > 1e-3  # the ablation does something
        else:
            assert row["right"] is True and row["logits_difference"] < 1e-4
        if row["method"].startswith("patched"):
            assert row["sites"] == 7 and row["residual"] < 1e-6


def test_a_fast_wrong_method_shows_as_wrong(run, monkeypatch):
    wrong = {
        "patched": lambda model, direction: patch(model, Ablate(direction, 0.5)),
        "patched, norms apart": lambda model, direction: nullcontext(),
    }
    monkeypatch.setattr(bench_model, "METHODS", {**bench_model.METHODS, **wrong})
    _, document = run()
    assert {r["method"]: r["right"] for r in document["rows"]} == {
        "unmodified": None,
        "patched": False,
        "patched, norms apart": False,
        "hooks": True,
    }


def test_a_method_that_fails_is_a_row_with_its_reason(run, monkeypatch):
    def broken(model, direction):
        raise ValueError("not today")

    monkeypatch.setattr(bench_model, "METHODS", {**bench_model.METHODS, "patched": broken})
    rows, _ = run()
    reasons = {row.status for row in rows if row.method == "patched"}
    assert reasons == {"failed: ValueError: not today"}
    assert all(row.speed is not None for row in rows if row.method != "patched")


def test_rounds_go_on_until_the_ratio_is_known(run):
    rounds = {}
    for within in ("1e9", "1e-9"):
        rows, _ = run("--rounds", "10", "--within", within, "--seconds", "3")
        rounds[within] = min(len(row.speed.ratios) for row in rows)
        for row in rows:
            low, high = row.speed.interval
            assert low <= row.speed.median <= high
    assert rounds["1e9"] == 10 < rounds["1e-9"]
