"""The edit as an adapter: what PEFT loads is the ablated model, and the model itself stays."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from checkpoints import IDS, ablated, direction, is_close
from safetensors.torch import load_file
from tiny import FAMILIES, tiny_model
from torch import nn

import refusal_kernels as rk
from refusal_kernels.errors import InputError
from refusal_kernels.weights import lora

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def state(model: Any) -> Any:
    """All that an adapter could leave behind in a model."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: id(module) for name, module in model.named_modules()},
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        sorted(vars(model)),
        model.config.to_dict(),
    )


def unchanged(before: Any, after: Any) -> bool:
    tensors, others = before[0], after[0]
    same = all(torch.equal(tensors[name], others[name]) for name in tensors)
    return same and tensors.keys() == others.keys() and before[1:] == after[1:]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_loads_is_the_ablated_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad = True
    model.train()
    before = state(model)
    report = rk.orthogonalize_lora(model, direction(), tmp_path / "adapter")
    assert unchanged(before, state(model))
    assert report.tied is tied and report.folder == tmp_path / "adapter"
    names = rk.orthogonalize(copy.deepcopy(model), direction()).edited
    assert report.edited == names
    assert report.biases == [name for name in names if name.endswith("bias")]
    assert report.certificate.problem is None and report.certificate.effect > 0.05

    model.eval()
    with torch.no_grad():
        expected, plain = ablated(model), model(IDS).logits
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
        # float32: the adapter's product is rounded apart from the layer's
        is_close(loaded, expected, 2e-5 * float(expected.abs().max()))
        assert (plain - expected).abs().max() > 0.1
        if not report.biases:
            with loaded.disable_adapter():
                assert torch.equal(loaded(input_ids=IDS).logits, plain)
        if not tied:
            merged = loaded.merge_and_unload()
            edited = copy.deepcopy(model)
            rk.orthogonalize(edited, direction())
            for (name, a), b in zip(merged.named_parameters(), edited.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def test_the_adapter_is_of_rank_one(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    rk.orthogonalize_lora(model, direction(), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (1, 1, "none")
    assert config["task_type"] == "CAUSAL_LM"
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(held) == 2 * (1 + 2 * 3)
    unit = (direction().vector.double() / direction().norm).float()
    for name, tensor in held.items():
        assert tensor.dtype == torch.float32 and 1 in tensor.shape
        if "_B" in name:
            assert torch.equal(tensor.flatten(), -unit)
    a = held["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    weight = model.model.layers[1].mlp.down_proj.weight.double()
    torch.testing.assert_close(a[0].double(), unit.double() @ weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4", "qwen3_moe", "gpt2", "phi"])
def test_experts_in_one_parameter_positions_and_parallel_blocks(
    family: str, tmp_path: Path
) -> None:
    model = tiny_families.build(family)
    report = rk.orthogonalize_lora(model, direction(), tmp_path / "adapter")
    edited = copy.deepcopy(model)
    rk.orthogonalize(edited, direction())
    inputs = tiny_families.inputs(model)
    with torch.no_grad():
        expected = edited(**inputs).logits
        got = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert any("experts" in name for name in report.edited) is (family not in ("gpt2", "phi"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen2", dtype=dtype)
    report = rk.orthogonalize_lora(model, direction(), tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wide = dtype is torch.float64
    assert {t.dtype for t in held.values()} == {torch.float64 if wide else torch.float32}
    certificate = report.certificate
    assert certificate.component < {torch.float64: 1e-14, torch.float16: 5e-3}.get(dtype, 4e-2)


class Doubled(nn.Embedding):
    """Looks up other rows than it is asked for."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids // 2)


def refused(model: Any, folder: Path, message: str) -> None:
    before, files = state(model), sorted(folder.parent.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        rk.orthogonalize_lora(model, direction(), folder)
    assert str(caught.value).isprintable()
    assert unchanged(before, state(model))
    assert sorted(folder.parent.rglob("*")) == files


def test_what_an_adapter_cannot_say_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    refused(
        tiny_families.build("opt"),
        folder,
        r"embed_positions\.weight .* nothing that an adapter reaches.*use rk\.orthogonalize",
    )
    model = tiny_model("qwen2")
    model.model.embed_tokens.__class__ = Doubled
    refused(
        model, folder, r"embed_tokens\.weight .* nothing that an adapter reaches.* of a Doubled"
    )
    refused(tiny_families.build("jetmoe"), folder, r"layers\.0\.mlp\.bias .*\[64\] of a JetMoeMoE")
    refused(tiny_families.build("mamba"), folder, "does not adapt MambaForCausalLM")
    refused(tiny_families.build("gemma2"), folder, r"\(Gemma2RMSNorm\), mul")
    # an adapter that is read in another way than it was written
    refused(tiny_families.build("laguna"), folder, "with the adapter in it: the direction is still")

    adapted = peft.get_peft_model(
        tiny_model("qwen2"), peft.LoraConfig(r=1, target_modules=["o_proj"])
    )
    with pytest.raises(InputError, match="merge or unload adapters first"):
        rk.orthogonalize_lora(adapted.get_base_model(), direction(), folder)

    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    refused(tiny_model("qwen2"), folder, r"an adapter needs PEFT: pip install")


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    refused(tiny_model("qwen2"), tmp_path / "adapter", "is there already")
    (tmp_path / "file").write_text("")
    refused(tiny_model("qwen2"), tmp_path / "file" / "adapter", "cannot be written")
