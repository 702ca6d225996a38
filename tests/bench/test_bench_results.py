"""Verdicts, comparisons and intervals of the results."""

import json

import pytest

from refusal_kernels.bench import results
from refusal_kernels.bench.worker import SITES


def test_what_edits_elsewhere_is_never_quite_right():
    row = {"method": "m", "sites": list(SITES), "residual": 0.02, "dtype": "bfloat16"}
    row |= {"logits_error": 0.07, "logits_allowed": 0.15, "logits_error_at_sites": None}
    assert results.verdict(row) == "yes"
    assert results.verdict(row | {"residual": 0.04}) == "no"
    elsewhere = row | {"sites": ["output"], "logits_error_at_sites": 0.01}
    assert results.verdict(elsewhere) == "part"
    assert results.verdict(elsewhere | {"logits_error_at_sites": 0.2}) == "no"


@pytest.mark.full
def test_compare_finds_a_planted_regression_and_passes_on_itself(bench, tmp_path):
    _, document = bench("--methods", "hooks")

    def at(ratio):
        copy = json.loads(json.dumps(document))
        row = next(row for row in copy["rows"] if row["method"] == "hooks")
        row |= {"ratio": ratio, "ratio_low": ratio - 0.01, "ratio_high": ratio + 0.01}
        return copy

    assert results.compare(document, document) == ([], 2)
    document, slower = at(0.9), at(0.85)
    worse, compared = results.compare(slower, document)
    assert compared == 2 and len(worse) == 1 and "0.900" in worse[0] and "hooks" in worse[0]
    assert results.compare(document, slower) == ([], 2)  # faster is no regression
    wrong = json.loads(json.dumps(document))
    wrong["rows"][1]["verdict"] = "no"
    assert len(results.compare(wrong, document)[0]) == 1

    old = tmp_path / "old.json"
    results.write_results(old, at(90.0))  # no machine is as fast as that
    result, _ = bench("--methods", "hooks", "--resume", "--compare", str(old))
    assert result.exit_code == 1 and "slower: hooks" in result.output


def test_the_interval_is_that_of_order_statistics():
    # of 20 values the 6th and the 15th: 95.9 %, the narrowest with 95 % (the sign test's table)
    assert results.interval([float(k) for k in range(1, 21)]) == (6.0, 15.0)
    assert results.interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (1.0, 6.0)
    with pytest.raises(ValueError, match="5 values"):
        results.interval([1.0] * 5)


def test_engines_are_compared_with_engines():
    def row(method, ratio):
        return {"method": method, "ratio": ratio, "status": "ok", "verdict": "yes"}

    plugin, hooked = row("vllm:plugin", 0.9), row("vllm:hooks", 0.95)
    ours, hooks = row("refusal_kernels:cpu", 0.8), row("hooks", 0.7)
    assert results.faster([plugin, hooked]) == (plugin, [hooked])
    assert results.faster([plugin, hooked, ours, hooks]) == (ours, [])
    assert results.faster([plugin, ours, hooks | {"ratio": 0.85}])[1] == [hooks | {"ratio": 0.85}]
