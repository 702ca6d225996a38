"""Edited weights against ablation by hooks, in float64, and what must not be edited."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import IDS, ablated, direction, is_close
from tiny import FAMILIES, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

import refusal_kernels as rk
from refusal_kernels.errors import InputError
from refusal_kernels.weights import in_memory, projection
from refusal_kernels.weights.in_memory import Orthogonalized, orthogonalize


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_edited_model_is_the_ablated_one(family: str, tied: bool) -> None:
    model = tiny_model(family, dtype=torch.float64, tie_word_embeddings=tied)
    edited = copy.deepcopy(model)
    report = orthogonalize(edited, direction())
    assert report.untied is tied
    expected = ablated(model)
    # float64 throughout, with the same unit vector up to an ulp
    is_close(edited, expected, 1e-10)
    assert (model(IDS).logits - expected).abs().max() > 0.1  # the direction matters


@pytest.mark.parametrize("family", FAMILIES)
def test_every_writer_is_edited_and_nothing_else(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    before = copy.deepcopy(dict(model.named_parameters()))
    report = orthogonalize(model, direction())
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
    unit = direction().vector.double() / direction().norm
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
    wide = copy.deepcopy(model).double()
    orthogonalize(model, direction())
    orthogonalize(wide, direction())
    for (name, got), expected in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, expected.to(dtype)), name


@pytest.mark.parametrize("shape", [(64,), (5, 64), (64, 5), (3, 5, 64), (3, 64, 5), (64, 3, 5)])
def test_the_projection_of_any_shape(shape: tuple[int, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr(projection, "BLOCK_NUMBERS", 130)  # two rows at a time, or 26
    generator = torch.Generator().manual_seed(0)
    r = projection.unit(direction())
    axis = shape.index(64)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = tensor.movedim(axis, -1).clone()
    torch.testing.assert_close(projection.times(tensor, axis, r), rows @ r, rtol=0, atol=1e-14)
    projection.project_(tensor, axis, r)
    expected = rows - (rows @ r).unsqueeze(-1) * r
    torch.testing.assert_close(tensor.movedim(axis, -1), expected, rtol=0, atol=1e-14)


def test_twice_is_once() -> None:
    model = tiny_model(dtype=torch.float64)
    orthogonalize(model, direction())
    once = copy.deepcopy(model)
    assert orthogonalize(model, direction()).untied is False
    for got, expected in zip(model.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)


def test_an_untied_model_survives_its_file(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    head = model.lm_head.weight.detach().clone()
    assert orthogonalize(model, direction()).untied
    assert model.config.tie_word_embeddings is False
    for recompute in (True, False):  # what loading and resizing call
        model.tie_weights(recompute_mapping=recompute)
    assert torch.equal(model.lm_head.weight, head)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(loaded.lm_head.weight, head)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    is_close(loaded, model(IDS).logits, 1e-6)


def test_the_report() -> None:
    report = orthogonalize(tiny_model("mistral"), direction())
    assert isinstance(report, Orthogonalized)
    assert report.edited[:2] == [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.o_proj.weight",
    ]
    assert report.unproved == [] and report.certificate.problem is None
    assert report.certificate.effect > 0.05
    assert list(report.certificate.layers) == ["embed", "layers.0", "layers.1", "layers.2"]


def test_a_model_is_as_it_was_around_the_edit() -> None:
    model = tiny_model()
    model.train()
    model.model.layers[1].eval()

    def state() -> list[Any]:
        return [
            (type(m), m.training, len(m._forward_hooks) + len(m._forward_pre_hooks))
            for m in model.modules()
        ]

    before = state()
    orthogonalize(model, direction())
    assert state() == before


# --- what is refused


def refused(model: Any, message: str, hidden: int = 64) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items() if v.device.type != "meta"}
    tied = model.config.tie_word_embeddings
    with pytest.raises(InputError, match=message) as caught:
        orthogonalize(model, direction(hidden))
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert model.config.tie_word_embeddings == tied


class Gain(nn.Module):
    """A factor per channel after a writer, or one for all channels."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 64)[-size:])

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.inner(x)


def with_gain(size: int) -> Any:
    model = tiny_model(dtype=torch.float64)
    model.model.layers[1].mlp = Gain(model.model.layers[1].mlp, size).double()
    return model


def test_a_gain_per_channel_is_refused_and_one_for_all_is_not() -> None:
    refused(with_gain(64), r"layers\.1\.mlp of .* goes through model\.layers\.1\.mlp \(Gain\), mul")
    model = with_gain(1)
    edited = copy.deepcopy(model)
    report = orthogonalize(edited, direction())
    assert "model.layers.1.mlp.gain" not in report.edited
    is_close(edited, ablated(model), 1e-10)


class Gated(nn.Module):
    """What is written is scaled by a number that was computed from it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out * out.norm(dim=-1, keepdim=True)


class Twice(nn.Module):
    """The embedding's rows go elsewhere too."""

    def __init__(self, inner: nn.Module, embedding: nn.Embedding) -> None:
        super().__init__()
        self.inner = inner
        self.__dict__["embedding"] = embedding

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.embedding.weight.mean(0))


def test_what_depends_on_a_writer_in_another_way_is_refused() -> None:
    model = tiny_model()
    model.model.layers[2].mlp = Gated(model.model.layers[2].mlp)
    refused(model, r"layers\.2\.mlp of .* \(Gated\), mul")
    model = tiny_model()
    model.model.layers[0].mlp = Twice(model.model.layers[0].mlp, model.model.embed_tokens)
    refused(model, r"embed_tokens\.weight .* is also used in model\.layers\.0\.mlp \(Twice\)")


class Experts(nn.Module):
    """Six experts, of which no text reaches but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts[0](x)
        return out


def test_experts_that_no_token_chose_are_edited_like_the_others() -> None:
    model = tiny_model()
    model.model.layers[1].mlp = Experts()
    edited = set(orthogonalize(model, direction()).edited)
    experts = {f"model.layers.1.mlp.experts.{k}.{p}" for k in range(6) for p in ("weight", "bias")}
    assert experts <= edited
    unit = projection.unit(direction())
    for expert in model.model.layers[1].mlp.experts:
        assert (unit @ expert.weight.double()).abs().max() < 1e-7
        assert (unit @ expert.bias.double()).abs() < 1e-7


def test_what_no_text_reaches_is_asked_about() -> None:
    model = tiny_model()
    model.model.vision = nn.Linear(8, 64)
    refused(
        model, r"2 parameters .*\(model\.vision\.weight, \.\.\.\); with text_only=True they are"
    )
    before = model.model.vision.weight.clone()
    report = orthogonalize(model, direction(), text_only=True)
    assert report.unproved == ["model.vision.weight", "model.vision.bias"]
    assert torch.equal(model.model.vision.weight, before)


def test_an_edit_that_is_not_ablation_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a writer overlooked, the proof would see it."""
    find = in_memory.find_writers

    for name, place in (
        ("model.layers.1.self_attn.o_proj.bias", "layers.1.attn"),
        ("model.embed_tokens.weight", "embed"),
    ):

        def forgetful(model: Any, left_out: str = name, **options: Any) -> Any:
            writers = find(model, **options)
            del writers.axes[left_out]
            return writers

        monkeypatch.setattr(in_memory, "find_writers", forgetful)
        refused(tiny_model(), f"the direction is still written at {place}:")


def test_what_is_no_plain_model_is_refused() -> None:
    refused(tiny_model(tie_word_embeddings=True), "hidden size 32; the model has 64", 32)
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}  # fmt: skip
    gemma = Gemma2ForCausalLM(Gemma2Config(**small))
    refused(gemma, r"\(Gemma2RMSNorm\), mul, .*; ablate it while the model runs instead")

    patched = tiny_model()
    with rk.patch(patched, rk.Ablate(direction())):
        refused(patched, "the model is patched")
    quantized = tiny_model()
    weight = quantized.model.layers[1].self_attn.o_proj.weight.to(torch.int8)
    quantized.model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(weight, False)
    refused(quantized, r"layers\.1\.self_attn\.o_proj\.weight is torch\.int8 on cpu")
    packed = tiny_model()
    packed.model.layers[0].mlp.register_buffer("qweight", torch.ones(2, 2, dtype=torch.int32))
    refused(packed, r"layers\.0\.mlp\.qweight is torch\.int32: the model is quantized")
    offloaded = tiny_model()
    offloaded.model.layers[2].mlp.to("meta")
    refused(offloaded, r"layers\.2\.mlp\.gate_proj\.weight is torch\.float32 on meta")


# --- the certificate


def test_a_certificate_tells_an_edited_model_from_one_that_is_not() -> None:
    model = tiny_model()
    edited = copy.deepcopy(model)
    orthogonalize(edited, direction())
    good = rk.certify(model, edited, direction(), IDS)
    assert good.problem is None and good.component < 1e-6 and good.relative < 1e-5
    assert good.tokens == IDS.numel() and good.dtype == "float32"
    difference = float((edited(IDS).logits - ablated(model)).abs().max())
    assert good.logit_difference == pytest.approx(difference, abs=1e-5)
    assert good.effect > 0.05

    forgotten = copy.deepcopy(edited)
    forgotten.model.layers[1].mlp.down_proj.bias = model.model.layers[1].mlp.down_proj.bias
    bad = rk.certify(model, forgotten, direction(), IDS)
    assert bad.problem is not None and "layers.1.mlp" in bad.problem
    assert bad.layers["layers.0"] < 1e-6 < 1e-3 < bad.layers["layers.1"]
    assert rk.certify(model, edited, direction(seed=2), IDS).problem is not None

    scaled = copy.deepcopy(edited)  # writes nothing along r, and is another model
    scaled.model.layers[0].mlp.down_proj.weight.data *= 2
    problem = rk.certify(model, scaled, direction(), IDS).problem
    assert problem is not None and "logits" in problem


def test_a_token_that_is_all_direction_is_no_problem() -> None:
    model = tiny_model()
    vector = direction().vector
    model.model.embed_tokens.weight[IDS[0, 0]] = vector / 128
    edited = copy.deepcopy(model)
    orthogonalize(edited, direction())
    left = edited.model.embed_tokens.weight[IDS[0, 0]].double()
    assert 0 < left.norm() < 1e-12
    assert (left @ vector.double()).abs() > 1e-3 * vector.norm() * left.norm()
    certificate = rk.certify(model, edited, direction(), IDS)
    assert certificate.problem is None and certificate.component < 1e-6


def test_a_certificate_in_half_precision_says_what_rounding_leaves() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    certificate = orthogonalize(copy.deepcopy(model), direction()).certificate
    assert certificate.dtype == "bfloat16" and certificate.problem is None
    assert 1e-4 < certificate.component < 4e-2
    said = certificate.to_dict()
    assert said["component"] == certificate.component and said["problem"] is None
    assert f"{certificate.component:.1e}" in str(certificate)


@pytest.mark.parametrize("error", [NotImplementedError, AttributeError])
def test_a_class_that_does_not_know_its_embedding_is_refused(error, monkeypatch):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    expected = rk.generate(model, tokenizer, ["make tea", "storm"], 4)
    monkeypatch.setattr(type(model), "get_input_embeddings", mock.Mock(side_effect=error))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(rk.InputError, match="LlamaForCausalLM does not say which module embeds"):
        rk.orthogonalize(model, rk.Direction(torch.randn(64)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert rk.generate(model, tokenizer, ["make tea", "storm"], 4) == expected
