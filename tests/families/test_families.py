"""Every family of causal language models in transformers, held against docs/families.md.

The comparison itself is `family_matrix.py`; here each family has to go as the page says.
"""

import collections

import family_matrix
import pages
import pytest
import tiny_families
import torch
import transformers
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from refusal_kernels import Ablate, Direction, patch

PAGE = (pages.DOCS / "families.md").read_text()
RECORDED = f"transformers {transformers.__version__}: " in PAGE
ROWS = {row[0]: row for row in pages.rows("families.md")}
VERDICTS: dict[str, tuple[str, str]] = {}  # of this run


@pytest.mark.xdist_group("families")
@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in tiny_families.PATHS else pytest.mark.full)
        for name in tiny_families.MODEL_TYPES
    ],
)
def test_a_family_goes_as_the_page_says(model_type):
    finding = family_matrix.examine(model_type)
    VERDICTS[model_type] = finding.kind, finding.verdict
    assert finding.verdict != family_matrix.FAILED, finding.note
    if RECORDED:
        assert finding.row() in PAGE.splitlines()
    elif model_type in ROWS:  # another version has other families, and other notes
        assert finding.verdict == ROWS[model_type][2]


@pytest.mark.full
@pytest.mark.xdist_group("families")
def test_the_families_that_are_here_keep_the_promises():
    """Of whatever version is installed: counted in this run, not read from the page."""
    if len(VERDICTS) < len(tiny_families.MODEL_TYPES):
        pytest.skip("not all families were examined in this run")
    decoders = [verdict for kind, verdict in VERDICTS.values() if kind == "decoder"]
    verdicts = collections.Counter(decoders)
    good = verdicts["fused"] + verdicts["unfused"]
    assert len(decoders) > 150
    assert good >= 0.95 * len(decoders) and verdicts["fused"] >= 0.80 * len(decoders)


def test_the_page_keeps_its_promises():
    rows = [row for row in ROWS.values() if row[1] == "decoder"]
    verdicts = collections.Counter(row[2] for row in rows)
    assert sum(verdicts.values()) > 150
    good = verdicts["fused"] + verdicts["unfused"]
    assert good >= 0.95 * len(rows) and verdicts["fused"] >= 0.80 * len(rows)
    assert all(len(row) == 6 for row in rows if row[2] != "fused")  # each with its reason


@pytest.mark.parametrize(
    ("model_type", "settings", "places"),
    [
        ("gpt_neox", {"use_parallel_residual": False}, 9),
        ("falcon", {"parallel_attn": False, "new_decoder_architecture": False}, 9),
        ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}, 5),
        ("stablelm", {"use_parallel_residual": True}, 5),
        ("bloom", {"apply_residual_connection_post_layernorm": False}, 9),
        ("gpt2", {"add_cross_attention": True}, 13),  # its adds do not run without an encoder
    ],
)
def test_other_shapes_of_a_layer(monkeypatch, model_type, settings, places):
    """Settings change which adds run: those that cannot are not counted, the others are found."""
    config = tiny_families.build(model_type).config
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = model_class(config).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.1) if p.ndim > 1 else p.data.add_(0.1 * torch.randn_like(p))
    monkeypatch.setattr(tiny_families, "build", lambda _: model)
    finding = family_matrix.examine(model_type)
    assert (finding.verdict, finding.places) == (family_matrix.FUSED, places), finding.note


class _Ops(TorchDispatchMode):
    """Counts the ops that really run."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_two_fused_calls_a_layer_and_nothing_beside(family):
    model = tiny_model(family)
    tokens = torch.randint(7, 30, (2, 9))
    with torch.no_grad(), _Ops() as plain:
        model(tokens)
    with patch(model, Ablate(Direction(torch.randn(64)))), torch.no_grad(), _Ops() as ops:
        model(tokens)
    layers = len(model.model.layers)
    assert ops.seen["add_steer_rms_norm_inference"] == 1 + 2 * layers  # and the start of the stream
    assert ops.seen["add_steer_inference"] == ops.seen["rms_norm"] == 0
    assert plain.seen["rsqrt"] == 1 + 2 * layers and ops.seen["rsqrt"] == 0


def test_gemma_norms_multiply_by_one_plus_the_weight():
    model = tiny_families.build("gemma2")
    with patch(model, Ablate(Direction(torch.randn(64)))), torch.no_grad(), _Ops() as ops:
        model(**tiny_families.inputs(model))
    layers = len(model.model.layers)
    assert ops.seen["add_steer_rms_norm_inference"] == 1 + 2 * layers
