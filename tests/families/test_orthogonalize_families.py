"""Every family of causal language models, held against docs/orthogonalize.md.

The comparison itself is `orthogonalize_matrix.py`; here each family has to go as the page
says: edited to what ablation gives, in memory, shard by shard and as an adapter, or refused.
"""

import collections

import pytest

pytest.importorskip("peft")
import orthogonalize_matrix
import pages
import tiny_families
from orthogonalize_matrix import EDITED, FAILED, REFUSED, SAME, YES

PAGE = (pages.DOCS / "orthogonalize.md").read_text()
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
    ways_of = {row[0]: row[2:5] for row in pages.rows("orthogonalize.md") if row[1] == "decoder"}
    assert len(ways_of) > 150
    counts = collections.Counter(way for ways in ways_of.values() for way in ways)
    assert counts[EDITED] >= 110 and counts[SAME] >= 115 and counts[YES] >= 100
    # what everyone has, experts fused and not, biases, learned positions, tied embeddings
    usual = "llama qwen2 qwen3 mistral gemma phi3 mixtral qwen3_moe gpt_oss deepseek_v3"
    for name in usual.split():
        assert ways_of[name] == [EDITED, SAME, YES]
    assert ways_of["opt"][:2] == [EDITED, SAME]
    # a norm or a gain between what writes and the stream
    for name in "gemma2 gemma3_text olmo2 glm4 exaone4 bloom doge".split():
        assert ways_of[name][0] == REFUSED
