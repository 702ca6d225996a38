"""Chat models that transformers lists as models of images and text alone, run on text."""

import family_matrix
import pytest
import tiny_families
import torch
from safetensors.torch import load_file
from tiny import run_command, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import refusal_kernels as rk
from refusal_kernels.hf.chat_models import auto_class
from refusal_kernels.hf.load import load

# those that can be built here at the size of a test, and take text alone
STEERED = """aria aya_vision cohere2_vision cohere_compass cosmos3_omni deepseek_vl
    deepseek_vl_hybrid exaone4_5 glm46v glm4v glm4v_moe glm_ocr glmga hunyuan_vl
    hyperclovax_vision_v2 idefics2 idefics3 inkling_mm_model internvl janus kimi_k25 kosmos-2.5
    lfm2_vl lfm3_vl lighton_ocr llava llava_next llava_next_video llava_onevision minicpm_ocr
    minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 mistral4 mistral_large4 muse_glimmer ovis2
    paddleocr_vl paligemma pp_chart2table qianfan_ocr qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe
    shieldgemma2 smolvlm step3p7 video_llama_3 video_llava vipllava""".split()
QUICK = ("llava", "mistral3", "qwen3_vl", "qwen2_vl")


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.full)
        for name in STEERED
        if name in tiny_families.IMAGE_TYPES  # other versions have others
    ],
)
def test_the_text_of_a_model_of_images_is_steered_exactly(model_type):
    finding = family_matrix.examine(model_type)
    assert finding.verdict == family_matrix.FUSED, finding.note


def test_which_class_loads_a_model():
    for model_type, kind in (
        ("llama", AutoModelForCausalLM),
        ("gemma3", AutoModelForCausalLM),  # listed as both
        ("llava", AutoModelForImageTextToText),
    ):
        assert auto_class(tiny_families.build(model_type).config) is kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA on disk whose template, which wants parts, lies in its processor's file."""
    folder = tmp_path_factory.mktemp("llava")
    tiny_families.build("llava").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    template = (
        "{% for m in messages %}<|{{ m.role }}|> {% for part in m.content %}{{ part.text }}"
        "{% endfor %} <|end|>{% endfor %} <|assistant|> answer :"
    )
    rk.files.atomic.write_json(folder / "chat_template.json", {"chat_template": template})
    rk.files.atomic.write_json(folder / "preprocessor_config.json", {"size": 28})
    return folder


def test_a_folder_is_loaded_for_its_text(folder):
    model, tokenizer = load(str(folder), "cpu")
    assert "<|assistant|>" in tokenizer.chat_template and model.config.model_type == "llava"
    prompts = ["make tea", "tell me how to fix the box"]
    plain = rk.generate(model, tokenizer, prompts, 5, 1)
    assert rk.generate(model, tokenizer, prompts, 5) == plain
    vectors = rk.mean_difference(model, tokenizer, prompts, prompts[:1]).vectors
    assert vectors.shape[1:] == (4, 64) and bool(vectors.isfinite().all())


def test_what_images_add_between_blocks_is_reported():
    model = tiny_families.build("qwen3_vl")
    direction = rk.Direction(torch.randn(64))
    with rk.patch(model, rk.Ablate(direction)) as handle:
        assert handle.report().unsteered and "not steered: what images add" in str(handle.report())
    llava = tiny_families.build("llava")
    with rk.patch(llava, rk.Ablate(direction)) as handle:
        assert not handle.report().unsteered and "not steered" not in str(handle.report())


def test_the_vision_tower_is_kept_by_both_ways_of_editing(folder, tmp_path):
    rk.Direction(torch.randn(64), layer=1).save(tmp_path / "direction.safetensors")
    words = ("orthogonalize", "--model", folder, "--direction", tmp_path / "direction.safetensors")
    words = (*words, "--text-only", "--device", "cpu", "--out")
    assert run_command(*words, tmp_path / "shards") == 0
    assert run_command(*words, tmp_path / "memory", "--in-memory") == 0
    shards, memory = (load_file(tmp_path / n / "model.safetensors") for n in ("shards", "memory"))
    assert shards.keys() == memory.keys() and any("vision" in name for name in shards)
    assert all(torch.equal(shards[name], memory[name]) for name in shards)
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("shards", "memory")]
    assert names[0] == names[1] and "preprocessor_config.json" in names[0]
