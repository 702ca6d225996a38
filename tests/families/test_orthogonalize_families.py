"""Every family of causal language models, held against docs/orthogonalize.md.

The comparison itself is `orthogonalize_matrix.py`; here each family has to go as the page
says: edited to what ablation gives, in memory, shard by shard and as an adapter, or refused.
"""

import collections
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("peft")
import orthogonalize_matrix  # noqa: E402
import tiny_families  # noqa: E402
from orthogonalize_matrix import EDITED, FAILED, REFUSED, SAME, YES  # noqa: E402

PAGE = (ROOT / "docs" / "orthogonalize.md").read_text()
RECORDED = orthogonalize_matrix.VERSIONS in PAGE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in tiny_families.PATHS else pytest.mark.full)
        for name in tiny_families.MODEL_TYPES
    ],
)
def test_a_family_goes_as_the_page_says(model_type: str) -> None:
    finding = orthogonalize_matrix.examine(model_type)
    assert FAILED not in (finding.memory, finding.shards, finding.adapter), finding
    assert finding.note or REFUSED not in (finding.memory, finding.shards, finding.adapter)
    if RECORDED:  # other versions have other families
        assert finding.row() in PAGE.splitlines()


def test_the_page_keeps_its_promises() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if " | decoder | " in line]
    found = {row[0]: row[2:5] for row in rows}
    assert len(found) > 150
    counts = collections.Counter(way for ways in found.values() for way in ways)
    assert counts[EDITED] >= 110 and counts[SAME] >= 115 and counts[YES] >= 100
    # what everyone has, experts fused and not, biases, learned positions, tied embeddings
    for (
        name
    ) in "llama qwen2 qwen3 mistral gemma phi3 mixtral qwen3_moe gpt_oss deepseek_v3".split():
        assert found[name] == [EDITED, SAME, YES]
    assert found["opt"][:2] == [EDITED, SAME]
    # a norm or a gain between what writes and the stream
    for name in "gemma2 gemma3_text olmo2 glm4 exaone4 bloom doge".split():
        assert found[name][0] == REFUSED
