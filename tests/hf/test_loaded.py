"""A folder that does not hold what its configuration says is refused, in one line."""

import json

import pytest
import tiny_families
import torch
from safetensors.torch import load_file, save_file
from tiny import run_command, tiny_model, tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertModel

from refusal_kernels.errors import InputError
from refusal_kernels.hf.load import load
from refusal_kernels.hf.loaded import REPORTED, check_loaded
from refusal_kernels.research.evaluation.judge_models import load_judge


@pytest.fixture
def folder(tmp_path):
    """A whole model, in a folder."""
    tiny_model(vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def change(folder, edit):
    """Write the tensors of a folder anew, as `edit` changes them."""
    file = folder / "model.safetensors"
    save_file(dict(edit(load_file(file))), file, metadata={"format": "pt"})


def renamed(weights):
    return {k.replace("model.layers.", "model.blocks."): v for k, v in weights.items()}


def without(*words):
    return lambda weights: {k: v for k, v in weights.items() if not any(w in k for w in words)}


WRONG = {
    "another name of the list": (renamed, r"lack the weight model\.layers\.0\.\S+ and 47 more"),
    "one norm": (without("model.norm"), r"lack the weight model\.norm\.weight; expected all"),
    "an untied head": (without("lm_head"), r"lack the weight lm_head\.weight;"),
    "another shape": (
        lambda w: w | {"model.norm.weight": torch.ones(32)},
        r"model\.norm\.weight in its files: \[32\] instead of \[64\]",
    ),
    "norms of another family": (
        lambda w: w | {"model.layers.1.self_attn.q_norm.weight": torch.ones(16)},
        r"no place for the weight model\.layers\.1\.self_attn\.q_norm\.weight of its files",
    ),
    "a parameter of another family": (
        lambda w: w | {"model.layers.1.self_attn.sinks": torch.ones(4)},
        r"no place for the weight model\.layers\.1\.self_attn\.sinks of its files",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_files_lack_is_named(case, folder, capfd):
    edit, words = WRONG[case]
    change(folder, edit)
    with pytest.raises(InputError, match=words):
        load(str(folder), "cpu")
    before = sorted(folder.rglob("*"))
    assert run_command("generate", "hi", "--model", folder, "--device", "cpu") == 2
    out, err = capfd.readouterr()
    assert "error: model" in err and not out and sorted(folder.rglob("*")) == before


def test_an_edit_in_memory_writes_no_noise(folder, tmp_path):
    from refusal_kernels import Direction

    change(folder, renamed)
    Direction(torch.ones(64), layer=1).save(folder / "direction.safetensors")
    words = ("--model", folder, "--direction", folder / "direction.safetensors", "--in-memory")
    assert run_command("orthogonalize", *words, "--device", "cpu", "--out", tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()


def test_biases_that_the_configuration_denies(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mlp_bias": False}))
    with pytest.raises(InputError, match=r"no place for .*mlp\.down_proj\.bias and 8 more"):
        load(str(folder), "cpu")


def test_what_is_not_missed(tmp_path, folder, caplog):
    """Tied heads, old buffers, heads and layers that no model loads; one line says so."""
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.3.eh_proj.weight": torch.ones(64, 64),  # of a fourth, for speculation
        "vision_tower.blocks.0.weight": torch.ones(4),
    }
    change(folder, lambda weights: weights | extra)
    load(str(folder), "cpu")
    (said,) = caplog.messages
    assert "2 weights of its files are in no part that is loaded: model.layers.3.eh_proj" in said
    caplog.clear()
    tied = tmp_path / "tied"
    tiny_model(vocab_size=len(tiny_tokenizer()), tie_word_embeddings=True).save_pretrained(tied)
    tiny_tokenizer().save_pretrained(tied)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load(str(tied), "cpu")
    assert caplog.messages == []


def test_judges_too(folder, tmp_path):
    change(folder, renamed)
    with pytest.raises(InputError, match=r"judge: model .* lack the weight"):
        load_judge(str(folder))
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    encoder = tmp_path / "encoder"
    BertModel(config).save_pretrained(encoder)
    tiny_tokenizer().save_pretrained(encoder)
    said = json.loads((encoder / "config.json").read_text())
    said["architectures"] = [BertForSequenceClassification.__name__]
    (encoder / "config.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=r"judge: model .* lack the weight classifier\.bias and 1"):
        load_judge(str(encoder))


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in ("gpt2", "gemma2", "mixtral") else pytest.mark.full)
        for name in tiny_families.MODEL_TYPES
        if tiny_families.kind(name) == "decoder" and name != "gemma3n"  # which needs timm to load
    ],
)
def test_a_whole_model_of_every_family_is_taken(model_type, tmp_path):
    model = tiny_families.build(model_type)
    model.save_pretrained(tmp_path)
    check_loaded(model_type, *type(model).from_pretrained(tmp_path, **REPORTED))
