"""Save a model with what its files hold and a load leaves out: other tensors, and other files."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_json, write_json
from refusal_kernels.hf.embedded import EMBEDDED
from refusal_kernels.hf.loaded import unread_tensors
from refusal_kernels.weights.checkpoint_plan import untied_config
from refusal_kernels.weights.shards import (
    INDEX,
    SINGLE,
    WEIGHTS,
    Shard,
    other_files,
    read_shard,
    read_shards,
)

CONFIG = "config.json"


def source_folder(name: str, revision: str | None = None, offline: bool = False) -> Path | None:
    """Return the folder that a model was loaded from; None for one that comes from elsewhere.

    Of a model of the hub that is its folder in the cache. What its repository has besides weights
    is fetched first, unless ``offline``: a load takes only what it reads.
    """
    if name in EMBEDDED:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    weights = [f"*{suffix}" for suffix in WEIGHTS]
    for local in (True,) if offline else (False, True):  # the cache serves where the hub does not
        with suppress(Exception):  # no hub id: a file of another format
            return Path(
                snapshot_download(
                    name, revision=revision, ignore_patterns=weights, local_files_only=local
                )
            )
    return None


def save_whole(model: Any, tokenizer: Any, source: Path | None, target: Path) -> list[str]:
    """Save a loaded model, and beside it whatever else its source holds.

    Parameters
    ----------
    model, tokenizer
        What was loaded, with edited weights.
    source
        The folder of `source_folder`. Its other files are copied as they are.
    target
        A folder that is there.

    Returns
    -------
    list of str
        The tensors of the source that are lost, because they have other names there than the model
        is saved with.
    """
    model.save_pretrained(target)
    if source is None:
        tokenizer.save_pretrained(target)
        return []
    along, _ = other_files(source)
    for name in along:
        if name != CONFIG:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    try:
        shards = read_shards(source)
    except InputError:  # not in safetensors, so all that was read has been converted
        return unread_tensors(model)
    saved = {entry.name for shard in read_shards(target) for entry in shard.entries}
    held = {entry.name for shard in shards for entry in shard.entries}
    if 2 * len(held & saved) < len(saved):
        return unread_tensors(model)
    # what is in the state has been loaded, under one of the names of tied weights
    rest = held - saved - set(model.state_dict())
    if rest:
        _add(shards, rest, target)
    _keep_config(model, source, target)
    return []


def _add(shards: list[Shard], names: set[str], target: Path) -> None:
    """Add tensors of the source to a saved model, in a file of their own."""
    tensors: dict[str, Any] = {}
    for shard in shards:
        with safe_open(shard.path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in names & set(file.keys())}
    if (target / SINGLE).exists():
        files = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
        (target / SINGLE).rename(target / files[0])
        keys = [entry.name for entry in read_shard(target / files[0]).entries]
        index: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(keys, files[0])}
        added = files[1]
    else:
        index, added = read_json(target / INDEX), "model-rest.safetensors"
    save_file(tensors, target / added, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, added)
    sizes = (path.stat().st_size for path in target.glob("*.safetensors"))
    index["metadata"] = {**index.get("metadata", {}), "total_size": sum(sizes)}
    write_json(target / INDEX, index)


def _keep_config(model: Any, source: Path, target: Path) -> None:
    """Keep the configuration of the whole model where a part of it was loaded."""
    document, saved = read_json(source / CONFIG), read_json(target / CONFIG)
    if document.get("model_type") == saved.get("model_type"):
        return
    if not saved.get("tie_word_embeddings", True):
        document = untied_config(document)
    dtype = saved.get("dtype", saved.get("torch_dtype"))
    for key in ("dtype", "torch_dtype"):
        if key in document:
            document[key] = dtype
    write_json(target / CONFIG, document)
