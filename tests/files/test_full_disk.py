"""A disk that is full, a folder that cannot be written: one line, and nothing is left behind."""

import collections
import os
import resource
import shutil

import pytest
import torch
from tiny import run_command, tiny_model, tiny_tokenizer

from refusal_kernels import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files import atomic
from refusal_kernels.files.atomic import check_space, new_folder, replacing, write_json

WAYS = {"by shards": ("--no-certify",), "in memory": ("--in-memory",), "adapter": ("--lora",)}
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def model(tmp_path, capfd):
    folder = tmp_path / "model"
    tiny_model(vocab_size=len(tiny_tokenizer())).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    Direction(torch.randn(64), layer=1).save(tmp_path / "direction.safetensors")
    capfd.readouterr()
    return folder


def orthogonalize(folder, *more):
    direction = folder.parent / "direction.safetensors"
    words = ("--model", folder, "--direction", direction, "--device", "cpu")
    return run_command("orthogonalize", *words, "--out", folder.parent / "new" / "out", *more)


def refused(capfd, words):
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err and lines == err.splitlines()[-1:] and words in lines[0], err


@pytest.mark.parametrize("way", list(WAYS)[:2])
def test_space_is_looked_for_before_the_work(way, model, monkeypatch, capfd):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 1000))
    before = sorted(model.parent.rglob("*"))
    assert orthogonalize(model, *WAYS[way]) == 2
    refused(capfd, "has 0 MiB free; expected 1 MiB")
    assert sorted(model.parent.rglob("*")) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_fills_up(way, model, capfd):
    """The limit of a file's size stands for the disk: the writers meet the same errors."""
    before = sorted(model.parent.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        assert orthogonalize(model, *WAYS[way]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(capfd, "out cannot be written: ")
    assert sorted(model.parent.rglob("*")) == before


def test_a_folder_that_cannot_be_written(model, monkeypatch, capfd):
    """As on a disk that is mounted to be read, or where a file stands in its place."""
    (model.parent / "file").touch()
    before = sorted(model.parent.rglob("*"))
    direction, target = model.parent / "direction.safetensors", model.parent / "file" / "x.gguf"
    assert run_command("convert", direction, target, "--as", "ablate") == 2
    refused(capfd, "file cannot be made: ")
    with pytest.raises(InputError, match=r"x\.gguf cannot be written"):
        write_json(target, {})
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    for more in ((), ("--in-memory",)):
        assert orthogonalize(model, *more) == 2
        refused(capfd, "new cannot be written to")
    (model.parent / "out").mkdir()
    assert run_command("demo", "--out", model.parent / "out") == 2
    refused(capfd, "out cannot be written to")
    (model.parent / "out").rmdir()
    assert sorted(model.parent.rglob("*")) == before


def test_a_temporary_file_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(atomic.Path, "unlink", read_only)
    refusal = pytest.raises(InputError, match="cannot be written: Read-only file system")
    with refusal, replacing(tmp_path / "file"):
        read_only()


def test_space_in_a_folder_that_is_not_there(tmp_path):
    check_space(tmp_path / "not" / "there", 1)
    with pytest.raises(InputError, match="MiB free; expected"):
        check_space(tmp_path / "not" / "there", 1 << 62)
    refusal = pytest.raises(InputError, match="out cannot be written: I/O error")
    with refusal, new_folder(tmp_path / "out"):
        raise atomic.SafetensorError("I/O error:\nNo space left on device")
    assert not list(tmp_path.iterdir())
