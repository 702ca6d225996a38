"""Edited weights against ablation by hooks, in float64, and what must not be edited."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, plain_hooks, tiny_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.orthogonalize import Orthogonalized, orthogonalize

IDS = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("one_thread")


def random_direction(hidden: int = 64, seed: int = 1) -> Direction:
    return Direction(7.0 * torch.randn(hidden, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_edited_model_is_the_ablated_one(family: str, tied: bool) -> None:
    model = tiny_model(family, dtype=torch.float64, tie_word_embeddings=tied)
    direction = random_direction()
    edited = copy.deepcopy(model)
    report = orthogonalize(edited, direction)
    assert report.untied is tied
    with plain_hooks(model, ablate=direction.vector.double()):
        expected = model(IDS).logits
    # float64 throughout, with the same unit vector up to an ulp
    torch.testing.assert_close(edited(IDS).logits, expected, rtol=0, atol=1e-10)
    assert (model(IDS).logits - expected).abs().max() > 0.1  # the direction matters


@pytest.mark.parametrize("family", FAMILIES)
def test_every_writer_is_edited_and_nothing_else(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    direction = random_direction()
    before = copy.deepcopy(dict(model.named_parameters()))
    report = orthogonalize(model, direction)
    after = dict(model.named_parameters())
    expected = {"model.embed_tokens.weight"} | {
        name
        for name in before
        if ("o_proj." in name or "down_proj." in name) and name.startswith("model.layers.")
    }
    biases = {"llama": 6, "qwen3": 3}.get(family, 0)
    assert len(expected) == 1 + 6 + biases
    assert len(report.edited) == len(set(report.edited)) and set(report.edited) == expected
    assert {k for k in after if not torch.equal(before[k], after[k])} == expected
    unit = direction.vector.double() / direction.norm
    for name in expected:
        written, kept = (
            p[name].T if "proj.weight" in name else p[name] for p in (after, before)
        )  # [..., hidden]
        assert (written @ unit).abs().max() < 1e-14
        change = (kept - written).reshape(-1, 64)
        torch.testing.assert_close(change, torch.outer(change @ unit, unit), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_the_float64_result_rounded_once(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    direction = random_direction()
    wide = copy.deepcopy(model).double()
    orthogonalize(model, direction)
    orthogonalize(wide, direction)
    for (name, got), expected in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, expected.to(dtype)), name


def test_twice_is_once() -> None:
    model = tiny_model(dtype=torch.float64)
    orthogonalize(model, random_direction())
    once = copy.deepcopy(model)
    assert orthogonalize(model, random_direction()).untied is False
    for got, expected in zip(model.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)


def test_a_large_embedding_is_done_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tiny_model(), tiny_model()
    orthogonalize(whole, random_direction())
    # by sys.modules: the package may export the function under the module's name
    monkeypatch.setattr(sys.modules[orthogonalize.__module__], "BLOCK", 7)
    orthogonalize(parts, random_direction())
    for got, expected in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_an_untied_model_survives_its_file(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    head = model.lm_head.weight.detach().clone()
    assert orthogonalize(model, random_direction()).untied
    assert model.config.tie_word_embeddings is False
    for recompute in (True, False):  # what loading and resizing call
        model.tie_weights(recompute_mapping=recompute)
    assert torch.equal(model.lm_head.weight, head)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(loaded.lm_head.weight, head)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)


def refused(model: Any, message: str, direction: Direction | None = None) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items() if v.device.type != "meta"}
    tied = model.config.tie_word_embeddings
    with pytest.raises(InputError, match=message) as caught:
        orthogonalize(model, direction or random_direction())
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert model.config.tie_word_embeddings == tied


def test_what_cannot_be_done_is_refused_and_nothing_is_changed() -> None:
    refused(
        tiny_model(tie_word_embeddings=True), "hidden size 32; the model has 64",
        random_direction(32),
    )  # fmt: skip
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}  # fmt: skip
    gemma = Gemma2Config(**small)  # a norm stands between its writers and the stream
    refused(Gemma2ForCausalLM(gemma), "Gemma2DecoderLayer is not supported; expected one of Llama")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=40))
    refused(gpt2, "GPT2LMHeadModel has no")

    adapted = tiny_model()
    adapted.model.layers[2].mlp.down_proj = torch.nn.Sequential(torch.nn.Linear(96, 64))
    refused(adapted, "mlp.down_proj is a Sequential")
    quantised = tiny_model()
    weight = quantised.model.layers[1].self_attn.o_proj.weight.to(torch.int8)
    quantised.model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(weight, False)
    refused(quantised, r"layers\.1\.self_attn\.o_proj\.weight is torch\.int8 on cpu")
    offloaded = tiny_model()
    offloaded.model.layers[2].mlp.to("meta")
    refused(offloaded, r"layers\.2\.mlp\.down_proj\.weight is torch\.float32 on meta")


def test_the_report() -> None:
    report = orthogonalize(tiny_model("mistral"), random_direction())
    assert isinstance(report, Orthogonalized)
    assert report.edited[:2] == [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.o_proj.weight",
    ]
