"""Checkpoints from anyone: refused in one line, nothing written, nothing run, little memory."""

import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INDEX, SINGLE, contents, direction, header, save
from hostile import mutated, safetensors_bytes, sparse
from safetensors.torch import load_file, save_file

from refusal_kernels.errors import InputError
from refusal_kernels.weights.checkpoint import orthogonalize_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint in several files, and one in a single file."""
    path = tmp_path_factory.mktemp("hostile")
    save(path / "many", num_hidden_layers=2)
    save(path / "one", num_hidden_layers=2, shard="5GB")
    return path


def reheaded(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Write the single file anew with another header."""

    def damage(folder: Path) -> None:
        document, data = header(folder / SINGLE)
        changed = change(document)
        document = document if changed is None else changed
        (folder / SINGLE).write_bytes(safetensors_bytes(document, data))

    return damage


def offsets(begin: int, end: int) -> Damage:
    """Shift where the first tensor of the file begins and ends."""

    def change(document: dict[str, Any]) -> None:
        entries = [entry for name, entry in document.items() if name != "__metadata__"]
        first = min(entries, key=lambda entry: entry["data_offsets"])
        first["data_offsets"] = [first["data_offsets"][0] + begin, first["data_offsets"][1] + end]

    return reheaded(change)


def entry(**fields: Any) -> Damage:
    return reheaded(lambda document: document["model.norm.weight"].update(fields))


def replaced(data: bytes | Callable[[bytes], bytes], name: str = SINGLE) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(data(path.read_bytes()) if callable(data) else data)

    return damage


def indexed(change: Callable[[dict[str, Any]], Any], name: str = INDEX) -> Damage:
    """Change the index, or another document: in place, or for what is returned."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        changed = change(document)
        (folder / name).write_text(json.dumps(document if changed is None else changed))

    return damage


def elsewhere(name: str) -> Damage:
    """Let the index name a file of another place, where a good one lies."""

    def damage(folder: Path) -> None:
        moved = min(path.name for path in folder.glob("model-*"))
        place = name.format(folder=folder)
        outside = (folder / place).resolve()
        outside.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / moved, outside)
        replaced(
            lambda index: index.replace(moved.encode(), json.dumps(place)[1:-1].encode()), INDEX
        )(folder)

    return damage


def linked(name: str | None) -> Damage:
    """Make a file of the folder a link to one outside of it."""

    def damage(folder: Path) -> None:
        link = folder / (name or min(path.name for path in folder.glob("model-*")))
        outside = folder.parent / "outside.bin"
        if link.exists():
            shutil.move(link, outside)
        else:
            outside.write_text("secret")
        link.symlink_to(outside)

    return damage


def configured(**settings: Any) -> Damage:
    return indexed(lambda document: document.update(settings), "config.json")


def own_code(folder: Path) -> None:
    (folder / "model.py").write_text(f"open({str(folder.parent / 'executed')!r}, 'w')\n")
    configured(
        model_type="own", auto_map={"AutoConfig": "model.C", "AutoModelForCausalLM": "model.M"}
    )(folder)


def doubled(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*"))[:2]
    name = next(n for n in header(first)[0] if n != "__metadata__")
    held = load_file(second) | {name: load_file(first)[name]}
    save_file(held, second)


def retensored(name: str, tensor: torch.Tensor | None) -> Damage:
    """Replace a tensor of the single file, or leave it out."""

    def damage(folder: Path) -> None:
        held = load_file(folder / SINGLE) | {name: tensor}
        save_file({k: v for k, v in held.items() if v is not None}, folder / SINGLE)

    return damage


NO_MAP = "expected a weight_map"

DOWN = "model.layers.1.mlp.down_proj.weight"
# what is done to a checkpoint in one file, and what the message says
ONE: dict[str, tuple[Damage, str]] = {
    # headers
    "empty": (replaced(b""), "damaged or no safetensors file"),
    "cut in the length": (replaced(b"\x00\x01"), "damaged or no safetensors file"),
    "cut in the header": (replaced(lambda d: d[:500]), "a header of .* in a file of 500"),
    "cut in the data": (replaced(lambda d: d[:-100]), "its header says"),
    "more than it says": (replaced(lambda d: d + bytes(64)), "its header says"),
    "a header of an exabyte": (
        replaced(lambda d: (1 << 60).to_bytes(8, "little") + d[8:]), "a header of"),
    "a header of 200 MB": (
        lambda f: sparse(f / SINGLE, (200 << 20).to_bytes(8, "little"), 1 << 30), "a header of"),
    "a header of no JSON": (reheaded(lambda _: b"{]"), "is not JSON"),
    "a header of no text": (reheaded(lambda _: b"\xff\xfe{}"), "not UTF-8"),
    "a header that is a list": (reheaded(lambda _: []), "no table of tensors"),
    "a deep header": (reheaded(lambda _: b"[" * 500_000), "nested too deeply"),
    "a wide header": (reheaded(lambda _: b"[" + b"1," * 3_000_000 + b"1]"), "too much"),
    "metadata of numbers": (
        reheaded(lambda d: {**d, "__metadata__": {"a": 1}}), "metadata is not of strings"),
    "overlapping": (offsets(0, 4), "damaged"),
    "a gap": (offsets(0, -4), "damaged"),
    "before the data": (offsets(-8, -8), "damaged"),
    "an end before its begin": (entry(data_offsets=[256, 0]), "in -256 bytes"),
    "beyond the file": (entry(data_offsets=[1 << 40, (1 << 40) + 256]), "overlaps, or"),
    "a shape that lies": (entry(shape=[1 << 40]), "in 256 bytes"),
    "a shape that overflows": (entry(shape=[1 << 33, 1 << 33]), "in 256 bytes"),
    "a negative shape": (entry(shape=[-8, -8]), "no dtype, shape and offsets"),
    "a shape of words": (entry(shape=["64"]), "no dtype, shape and offsets"),
    "a shape of truth": (entry(shape=[True]), "no dtype, shape and offsets"),
    "many dimensions": (entry(shape=[1] * 100_000 + [64]), "damaged"),
    "an unknown dtype": (entry(dtype="F1"), "no dtype, shape and offsets"),
    "a tensor that is none": (reheaded(lambda d: {**d, "a": None}), "no dtype, shape and offsets"),
    # links, and what is no file
    "a pipe for a shard": (
        lambda f: ((f / SINGLE).unlink(), os.mkfifo(f / SINGLE)), "is not there"),
    "a folder for a shard": (
        lambda f: ((f / SINGLE).unlink(), (f / SINGLE).mkdir()), "is not there"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "has neither model.safetensors nor"),
    # the configuration
    "no configuration": (lambda f: (f / "config.json").unlink(), "is not there"),
    "a configuration of nothing": (replaced(b"[]", "config.json"), "expected a JSON object"),
    "a deep configuration": (replaced(b'{"a":' * 100_000, "config.json"), "nested too deeply"),
    "a family of its own": (own_code, "brings code of its own"),
    "an unknown family": (configured(model_type="none"), "config.json cannot be used"),
    "an encoder": (configured(model_type="clip"), "the model has 512"),
    "quantized": (configured(quantization_config={"quant_method": "fp8"}), "is quantized"),
    "a billion layers": (configured(num_hidden_layers=10**9), "layers is 10"),
    "more layers than tensors": (configured(num_hidden_layers=60), "says 60 layers"),
    "another number of layers": (configured(num_hidden_layers=3), "has 0 tensors for"),
    "a billion experts": (
        configured(model_type="mixtral", num_local_experts=10**9), "experts is 10"),
    "a billion words": (configured(vocab_size=10**9), "embed_tokens.weight would be"),
    "a wide layer": (configured(intermediate_size=10**8), "would be .* by the config"),
    "a head of a billion": (configured(head_dim=10**7), "would be .* by the config"),
    "words for numbers": (configured(hidden_size="many"), "config.json cannot be used"),
    "another width": (configured(hidden_size=32), "hidden size 64; the model has 32"),
    "another shape": (configured(intermediate_size=95), "is .64, 96.; the model of"),
    # tensors
    "a writer of integers": (
        retensored(DOWN, torch.ones(64, 96, dtype=torch.int8)), "is I8; expected one of"),
    "a writer of another shape": (
        retensored(DOWN, torch.ones(96, 64)), "is .96, 64.; the model of"),
    "a writer that is missing": (retensored(DOWN, None), "has 0 tensors for"),
}  # fmt: skip
# and to one in many files
MANY: dict[str, tuple[Damage, str]] = {
    # the index
    "above": (elsewhere("../outside.safetensors"), "expected the name of a .safetensors"),
    "far above": (elsewhere("a/../../outside.safetensors"), "expected the name of"),
    "absolute": (elsewhere("{folder}/../outside.safetensors"), "expected the name of"),
    "below": (elsewhere("inner/w.safetensors"), "expected the name of"),
    "backslashes": (elsewhere("..\\outside.safetensors"), "expected the name of"),
    "hidden": (elsewhere(".w.safetensors"), "expected the name of"),
    "another kind": (elsewhere("w.bin"), "expected the name of"),
    "a file that is not there": (
        indexed(lambda d: d["weight_map"].update(a="z.safetensors")), "is not there"),
    "a tensor that is not there": (
        indexed(lambda d: d["weight_map"].update(a=next(iter(d["weight_map"].values())))),
        "says that 'a' is in"),
    "a tensor that it does not name": (
        indexed(lambda d: d["weight_map"].popitem() and None), "is in None; it is in"),
    "a tensor in two files": (doubled, "is in .* and in"),
    "no weight_map": (indexed(lambda d: {"metadata": {}}), NO_MAP),
    "an empty weight_map": (indexed(lambda d: {"weight_map": {}}), NO_MAP),
    "a weight_map of numbers": (indexed(lambda d: {"weight_map": {"a": 1}}), NO_MAP),
    "an index that is a list": (indexed(lambda d: []), NO_MAP),
    "a deep index": (replaced(b'{"a":' * 200_000, INDEX), "nested too deeply"),
    "a wide index": (replaced(b"[" + b"{}," * 3_000_000 + b"{}]", INDEX), "too much"),
    "a large index": (lambda f: sparse(f / INDEX, b"[", 1 << 36), "a JSON file of at most"),
    # links, and what is no file
    "a shard elsewhere": (linked(None), "outside of its folder"),
    "an index elsewhere": (linked(INDEX), "outside of its folder"),
    "a configuration elsewhere": (linked("config.json"), "outside of its folder"),
    "a page elsewhere": (linked("passwords.txt"), "outside of its folder"),
    "a link to nothing": (
        lambda f: (f / "a.txt").symlink_to(f / "nothing"), "is no file; expected"),
    "a pipe": (lambda f: os.mkfifo(f / "a.txt"), "is no file; expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*ONE, *MANY])
def test_a_hostile_checkpoint_is_refused_and_nothing_is_written(
    case: str, whole: Path, tmp_path: Path
) -> None:
    damage, message = (ONE | MANY)[case]
    folder = tmp_path / "at" / "source"
    shutil.copytree(whole / ("one" if case in ONE else "many"), folder)
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=message) as caught:
        orthogonalize_checkpoint(folder, tmp_path / "target", direction())
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2100
    assert sorted(tmp_path.rglob("*")) == before  # no target, nothing executed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 600_000  # KiB


def test_bad_places(whole: Path, tmp_path: Path) -> None:
    def refused(source: Path, target: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            orthogonalize_checkpoint(source, target, direction())

    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    refused(tmp_path / "none", tmp_path / "target", "none is not there")
    refused(tmp_path / "file", tmp_path / "target", "file is not there; expected a folder")
    refused(whole / "one", tmp_path, "is there already")
    refused(whole / "one", tmp_path / "link", "is there already")
    refused(whole / "one", whole / "one" / "target", "which is only read")
    refused(whole / "one", tmp_path / "file" / "target", "cannot be written")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]
    assert "target" not in os.listdir(whole / "one")


def test_links_into_the_hubs_cache_are_followed(whole: Path, tmp_path: Path) -> None:
    """There, files are links into the folder blobs beside the snapshots."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((whole / "many").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    orthogonalize_checkpoint(snapshot, tmp_path / "target", direction())
    orthogonalize_checkpoint(whole / "many", tmp_path / "plain", direction())
    assert contents(tmp_path / "target") == contents(tmp_path / "plain")
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_damaged_files_are_refused_or_give_a_whole_folder(
    whole: Path, tmp_path: Path, name: str
) -> None:
    folder, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(whole / "one", folder)
    good, refused = (folder / name).read_bytes(), 0
    size = 8 + int.from_bytes(good[:8], "little") if name == SINGLE else len(good)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(60):
        damaged = mutated(good[:size], random.Random(f"{name} {seed}")) + good[size:]
        (folder / name).write_bytes(damaged)
        try:
            orthogonalize_checkpoint(folder, target, direction())
        except InputError as error:
            refused += 1
            assert str(error).isprintable()
            assert os.listdir(tmp_path) == ["source"], damaged[:2000]
        else:
            assert contents(target).keys() == contents(folder).keys()
            shutil.rmtree(target)
    assert refused > 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 600_000  # KiB
