"""The edit in memory keeps what was not loaded, as the edit shard by shard does."""

import json

import pytest
import tiny_families
import torch
from safetensors.torch import load_file, save_file
from tiny import run_command, tiny_model, tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from refusal_kernels import Direction
from refusal_kernels.hf.load import load
from refusal_kernels.weights.rest import source_folder

EXTRA = {
    "vision_tower.blocks.0.weight": torch.randn(4, 4),
    "mtp.layers.0.eh_proj.weight": torch.randn(64, 64, dtype=torch.float32),
    "score.weight": torch.randn(2, 64).to(torch.bfloat16),
}
FILES = {"preprocessor_config.json": {"size": 28}, "processor_config.json": {"image_token": "<i>"}}


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".safetensors" not in path.name and path.name != "config.json"
    }


def both_ways(source, tmp_path, *more):
    Direction(torch.randn(64), layer=1).save(tmp_path / "direction.safetensors")
    words = ("--model", source, "--direction", tmp_path / "direction.safetensors", *more)
    ways = {"shards": (), "memory": ("--in-memory",)}
    for way, option in ways.items():
        out = tmp_path / way
        assert run_command("orthogonalize", *words, "--device", "cpu", "--out", out, *option) == 0
    return [tmp_path / way for way in ways]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_both_ways_give_the_same_tensors_and_files(sharded, tied, tmp_path):
    source = tmp_path / "source"
    model = tiny_model(vocab_size=len(tiny_tokenizer()), tie_word_embeddings=tied)
    model.save_pretrained(source, max_shard_size="100KB" if sharded else "1GB")
    tiny_tokenizer().save_pretrained(source)
    for name, document in FILES.items():
        (source / name).write_text(json.dumps(document))
    if sharded:
        save_file(EXTRA, source / "model-extra.safetensors", metadata={"format": "pt"})
        index = json.loads((source / "model.safetensors.index.json").read_text())
        index["weight_map"] |= dict.fromkeys(EXTRA, "model-extra.safetensors")
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        whole = load_file(source / "model.safetensors") | EXTRA
        save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    shards, memory = both_ways(source, tmp_path)
    a, b = tensors(shards), tensors(memory)
    assert a.keys() == b.keys() and set(EXTRA) < set(a)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    assert all(torch.equal(b[name], value) for name, value in EXTRA.items())
    assert files(shards) == files(memory) and set(FILES) < set(files(memory))
    ids = torch.randint(7, 40, (2, 9))
    logits = [load(str(folder), "cpu")[0](ids).logits for folder in (shards, memory)]
    assert torch.equal(*logits)


def test_a_model_of_which_a_part_is_loaded(tmp_path):
    """Of a Qwen 3.5 the language model alone is loaded."""
    source = tmp_path / "source"

    whole = tiny_families._config(CONFIG_MAPPING["qwen3_5"])
    AutoModelForImageTextToText.from_config(whole).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    shards, memory = both_ways(source, tmp_path, "--text-only")
    a, b = tensors(shards), tensors(memory)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any("visual" in name for name in a)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, memory)]
    assert configs[0]["model_type"] == configs[1]["model_type"] == "qwen3_5"


def test_a_model_of_the_hub_keeps_files_that_the_load_did_not_fetch(tmp_path, monkeypatch):
    calls = []

    def fetched(name, *, revision, ignore_patterns, local_files_only):
        calls.append((name, revision, local_files_only))
        if not local_files_only and len(calls) == 3:
            raise OSError("no network")
        assert "*.safetensors" in ignore_patterns and "*.json" not in ignore_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert source_folder("maker/model", "v2") == tmp_path
    assert source_folder("maker/model", offline=True) == tmp_path
    assert source_folder("maker/model") == tmp_path  # the cache serves
    assert calls == [
        ("maker/model", "v2", False), ("maker/model", None, True),
        ("maker/model", None, False), ("maker/model", None, True),
    ]  # fmt: skip
    assert source_folder("toy") is None and source_folder(str(tmp_path)) == tmp_path
