"""A checkpoint edited shard by shard: the bits of the model edited in memory, the rest as is."""

import copy
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

import bench_checkpoint
import pytest
import tiny_families
import torch
from checkpoints import INDEX, ablated, contents, direction, is_close, raw, save, tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusal_kernels.errors import InputError
from refusal_kernels.weights.checkpoint import STATE, orthogonalize_checkpoint
from refusal_kernels.weights.in_memory import orthogonalize

pytestmark = pytest.mark.filterwarnings("ignore")


def same_parameters(got: Any, expected: Any) -> None:
    same_tensors(dict(got.named_parameters()), dict(expected.named_parameters()))


def same_tensors(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["100KB", "5GB"])
def test_the_files_hold_the_model_edited_in_memory(
    tmp_path: Path, dtype: torch.dtype, tied: bool, shard: str
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    model = save(source, shard=shard, dtype=dtype, tie_word_embeddings=tied)
    before = contents(source)
    report = orthogonalize_checkpoint(source, target, direction())
    assert contents(source) == before
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]

    edited = copy.deepcopy(model)
    names = orthogonalize(edited, direction()).edited
    assert sorted(report.edited) == sorted(names)
    assert report.untied is tied and report.target == target
    assert (report.unread, report.unproved, report.left_out, report.resumed) == ([], [], [], 0)
    edited.save_pretrained(tmp_path / "memory")
    same_tensors(tensors(target), tensors(tmp_path / "memory"))
    assert {tensor.dtype for tensor in tensors(target).values()} == {dtype}

    old, new = raw(source), raw(target)  # what is not edited: the same bytes
    kept = old.keys() - set(names)
    assert kept and all(new[name] == old[name] for name in kept)
    assert all(new[name] != old[name] for name in names)
    assert new.keys() - old.keys() == ({"lm_head.weight"} if tied else set())
    if tied:
        assert new["lm_head.weight"] == old["model.embed_tokens.weight"]

    files = contents(target)
    assert files.keys() == before.keys()
    config = json.loads(before["config.json"])
    assert json.loads(files["config.json"]) == {**config, "tie_word_embeddings": False}
    changed = {n for n in files if files[n] != before[n]} - {"config.json", INDEX}
    assert all(name.endswith(".safetensors") for name in changed)
    assert tied or files["config.json"] == before["config.json"]
    if shard == "100KB":
        index = json.loads(files[INDEX])
        assert index["weight_map"].keys() == new.keys()
        assert index["metadata"]["total_size"] == sum(map(len, new.values()))
        for name, file in index["weight_map"].items():
            assert f'"{name}"'.encode() in files[file]
        assert tied or files[INDEX] == before[INDEX]

    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto", local_files_only=True)
    same_parameters(loaded, edited)
    assert AutoTokenizer.from_pretrained(target, local_files_only=True)("tea").input_ids
    if dtype is torch.float64:
        is_close(loaded, ablated(model), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2", "gemma", "qwen3_moe"])
def test_experts_fused_and_not_and_embeddings_of_positions(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Mixtral's files hold every expert by itself, GPT-OSS's all in one tensor."""
    model = tiny_families.build(family).to(dtype)
    source, target = tmp_path / "source", tmp_path / "target"
    model.save_pretrained(source, max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    report = orthogonalize_checkpoint(source, target, direction())
    experts = [name for name in report.edited if "experts" in name]
    layers = model.config.num_hidden_layers
    assert len(experts) == {"mixtral": 4 * layers, "gpt_oss": 2 * layers, "qwen3_moe": 12}.get(
        family, 0
    )
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto", local_files_only=True)
    orthogonalize(model, direction())
    model.save_pretrained(tmp_path / "memory")
    same_tensors(tensors(target), tensors(tmp_path / "memory"))
    same_parameters(loaded, model)


def test_what_goes_along_and_what_does_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    save(source)
    (source / "code" / "inner").mkdir(parents=True)
    (source / "code" / "inner" / "a.py").write_text("x = 1\n")
    (source / ".cache").mkdir()
    (source / ".cache" / "b").write_text("of the hub's client\n")
    for name in ("pytorch_model.bin", "old.safetensors", "model.gguf", "code/w.pt"):
        (source / name).write_bytes(b"unedited")
    report = orthogonalize_checkpoint(source, target, direction())
    assert sorted(report.left_out) == [
        "code/w.pt", "model.gguf", "old.safetensors", "pytorch_model.bin"
    ]  # fmt: skip
    files = contents(target)
    assert files["code/inner/a.py"] == b"x = 1\n"
    assert not any("cache" in name or b"unedited" in data for name, data in files.items())


def test_extra_tensors_stay_and_are_told(tmp_path: Path) -> None:
    """A prediction layer that transformers does not load, for example."""
    source, target = tmp_path / "source", tmp_path / "target"
    save(source, shard="5GB")
    held = load_file(source / "model.safetensors")
    held["model.layers.7.mlp.down_proj.weight"] = torch.randn(64, 96)
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    report = orthogonalize_checkpoint(source, target, direction())
    assert report.unread == ["model.layers.7.mlp.down_proj.weight"]
    assert raw(source)[report.unread[0]] == raw(target)[report.unread[0]]


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    save(tmp_path / "source")
    told: list[tuple[int, int]] = []
    orthogonalize_checkpoint(
        tmp_path / "source", tmp_path / "target", direction(), progress=lambda *n: told.append(n)
    )
    size = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    assert told == sorted(told) and told[-1] == (size, size) and len(told) > 5


# --- interrupted


class Stop(BaseException):
    """Not caught anywhere: what a signal does, without the process."""


def interrupted(source: Path, target: Path, after: int, **options: Any) -> Path:
    """Run until so many bytes are written; returns the folder that is left."""

    def stop(done: int, total: int) -> None:
        if done > after:
            raise Stop

    with pytest.raises(Stop):
        orthogonalize_checkpoint(source, target, direction(), progress=stop, **options)
    assert not target.exists()
    return target.with_name(f".{target.name}.partial")


def test_finished_files_are_taken_over_unless_they_are_damaged(tmp_path: Path) -> None:
    source, target, whole = (tmp_path / name for name in ("source", "target", "whole"))
    save(source, tie_word_embeddings=True)
    orthogonalize_checkpoint(source, whole, direction())
    most = 4 * sum(path.stat().st_size for path in source.glob("*.safetensors")) // 5
    partial = interrupted(source, target, most)
    done = json.loads((partial / STATE).read_text())["done"]
    assert 1 < len(done) < len(list(source.glob("*.safetensors")))
    first = sorted(done)[0]
    data = bytearray((partial / first).read_bytes())
    data[-1] ^= 1
    (partial / first).write_bytes(data)
    (partial / "stray").write_text("not ours")
    inode = (partial / sorted(done)[-1]).stat().st_ino
    report = orthogonalize_checkpoint(source, target, direction())
    assert report.resumed == len(done) - 1
    assert contents(target) == contents(whole)
    assert (target / sorted(done)[-1]).stat().st_ino == inode  # the file itself
    assert sorted(os.listdir(tmp_path)) == ["source", "target", "whole"]


def test_what_another_run_left_is_not_taken(tmp_path: Path) -> None:
    source, target, whole = (tmp_path / name for name in ("source", "target", "whole"))
    save(source)
    partial = interrupted(source, target, 200_000)
    assert json.loads((partial / STATE).read_text())["done"]
    orthogonalize_checkpoint(source, whole, direction(seed=2))
    assert orthogonalize_checkpoint(source, target, direction(seed=2)).resumed == 0
    assert contents(target) == contents(whole)

    again = tmp_path / "again"
    interrupted(source, again, 200_000)
    file = sorted(source.glob("*.safetensors"))[0]
    os.utime(file, ns=(0, 0))  # another file, for all that is known
    assert orthogonalize_checkpoint(source, again, direction()).resumed == 0


def test_two_runs_at_once_are_kept_apart(tmp_path: Path) -> None:
    save(tmp_path / "source")
    partial = interrupted(tmp_path / "source", tmp_path / "target", 200_000)
    before = contents(partial)
    number = os.open(partial, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another run is writing"):
        orthogonalize_checkpoint(tmp_path / "source", tmp_path / "target", direction())
    assert contents(partial) == before
    os.close(number)
    assert orthogonalize_checkpoint(tmp_path / "source", tmp_path / "target", direction()).resumed


# --- memory


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read in /proc")
def test_the_peak_is_at_most_two_and_a_half_of_the_largest_tensor() -> None:
    """That is 0.3 GB here, beyond the imports; the checkpoint itself has 0.4 GB."""
    measured = bench_checkpoint.measure(1024, 2048, 65536, 6, None)
    assert measured["largest_tensor_bytes"] == 65536 * 1024 * 2
    assert measured["checkpoint_bytes"] > 2.5 * measured["largest_tensor_bytes"]
    assert measured["edited"] == 1 + 2 * 6
    assert 0 < measured["ratio_over_imported"] < bench_checkpoint.LIMIT
