"""Load models by the names that the command line takes."""

import contextlib
import importlib.util
import logging as python_logging
import os
from collections.abc import Iterator
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError, first_line
from refusal_kernels.hf.adapters import add_adapter
from refusal_kernels.hf.chat_models import auto_class, load_tokenizer
from refusal_kernels.hf.embedded import EMBEDDED, read_gguf
from refusal_kernels.hf.load_options import LoadOptions
from refusal_kernels.hf.loaded import REPORTED, check_loaded, unread_weights
from refusal_kernels.hf.model import hidden_size

logger = python_logging.getLogger(__name__)
GGUF = ".gguf"


def find_device(device: str | torch.device = "auto") -> torch.device:
    """Return a device; "auto" is an accelerator if there is one, else the CPU.

    Under torchrun each process has the accelerator of its local rank.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None:
            return torch.device("cpu")
        device = found
    try:
        chosen = torch.device(device)
        if chosen.type != "cpu" and chosen.index is None and "LOCAL_RANK" in os.environ:
            chosen = torch.device(chosen.type, int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"device '{device}': {first_line(error)}") from None
    return chosen


def load(
    name: str,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    direction: Direction | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, and check that a direction fits it.

    Weights go straight to where they will be used, without a whole copy in main memory first.

    Parameters
    ----------
    name
        A hub id, a folder, a ``.gguf`` file (its weights are dequantized), or a key of
        `refusal_kernels.hf.embedded.EMBEDDED`, such as "toy".
    device
        Where it runs; "auto" is on the accelerators, with what does not fit there on the CPU.
    dtype
        How it runs; "auto" is the checkpoint's dtype (float32 for an embedded model).
    direction
        To be checked against the model's hidden size.
    options
        The other fields of `refusal_kernels.hf.load_options.LoadOptions`: ``load_in``,
        ``tensor_parallel``, ``revision``, ``trust_remote_code``, ``attn``, ``adapter``,
        ``offline``.

    Raises
    ------
    InputError
        If one of these cannot be had, with the first line of the reason, or the files do not hold
        all weights of the model.
    """
    from transformers import AutoConfig

    how = LoadOptions(device, dtype, **options)
    placed = _placement(how)
    embedded = EMBEDDED.get(name)
    path, source = _source(name, how)
    if how.adapter is not None:
        _check_there(how.adapter, "adapter")
    # the toy model's file is float16 to be small; it is meant to run in float32
    precision = "float32" if embedded and dtype == "auto" else dtype
    settings = {"dtype": precision, **_quantization(how), **placed, **REPORTED}
    if how.attn is not None:
        settings["attn_implementation"] = how.attn
    with _refused(name):
        if path.endswith(GGUF):
            if how.load_in is not None:
                raise InputError(f"model '{name}' is dequantized; load_in='{how.load_in}' is not")
            loaded, tokenizer = read_gguf(Path(path).expanduser(), **settings)
        else:
            with _told(name):
                tokenizer = load_tokenizer(path, **source)
                kind = auto_class(AutoConfig.from_pretrained(path, **source))
            loaded = kind.from_pretrained(path, **source, **settings)
        model = check_loaded(name, *loaded)
        if unread := unread_weights(model):
            text = "model '%s': %d weights of its files are in no part that is loaded: %s, ..."
            logger.warning(text, name, len(unread), unread[0])
        for adapter in filter(None, (embedded and embedded.adapter, how.adapter)):
            model = add_adapter(model, str(adapter), offline=how.offline)
    check_hidden(name, model, direction)
    return model.eval(), tokenizer


def read_config(name: str, how: LoadOptions) -> Any | None:
    """Return a model's configuration, before anything is loaded; None of a ``.gguf`` file.

    Raises
    ------
    InputError
        As `load`.
    """
    from transformers import AutoConfig

    path, source = _source(name, how)
    if path.endswith(GGUF):
        return None
    with _refused(name):
        return AutoConfig.from_pretrained(path, **source)


def _source(name: str, how: LoadOptions) -> tuple[str, dict[str, Any]]:
    """Return where a model's files are, and the options of transformers that find them."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    embedded = EMBEDDED.get(name)
    if embedded is None:
        _check_there(name, "model")
    if how.revision is not None and (embedded or os.path.exists(name)):
        raise InputError(f"revision '{how.revision}': '{name}' is no repository of the hub")
    hub_logging.set_verbosity_error()  # what goes wrong is said once, by an error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # transformers asks at the terminal where it is not told
    source: dict[str, Any] = {
        "trust_remote_code": how.trust_remote_code,
        "local_files_only": how.offline,
    }
    if how.revision is not None:
        source["revision"] = how.revision
    return name if embedded is None else str(embedded.folder()), source


@contextlib.contextmanager
def _refused(name: str) -> Iterator[None]:
    """Turn whatever a hub, a config or a damaged file can bring into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"model '{name}' brings code of its own; read it, then give --trust-remote-code"
            ) from None
        why = first_line(error).rstrip(".")
        known = "" if os.path.exists(name) else f"; known by name: {', '.join(EMBEDDED)}"
        raise InputError(f"model '{name}' cannot be loaded: {why}{known}") from None


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Tell what transformers warns of, a line each, such as a rope factor that it ignores."""
    from transformers.utils import logging

    kept: SimpleQueue[python_logging.LogRecord] = SimpleQueue()
    handler, level = QueueHandler(kept), logging.get_verbosity()
    root = logging.get_logger("transformers")
    handlers, propagate = root.handlers, root.propagate
    root.handlers, root.propagate = [handler], False
    logging.set_verbosity_warning()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        root.handlers, root.propagate = handlers, propagate
        records = [kept.get() for _ in range(kept.qsize())]
        for text in dict.fromkeys(" ".join(record.getMessage().split()) for record in records):
            logger.warning("model '%s': %s", name, text)


def model_folder(name: str) -> str:
    """Return where a model's weights and its tokenizer are: a folder or a hub id.

    Raises
    ------
    InputError
        If it has files of another form, an adapter, or there is no such folder.
    """
    embedded = EMBEDDED.get(name)
    if name.endswith(GGUF) or (embedded and embedded.adapter):
        raise InputError(f"model '{name}' is no folder of whole weights; expected one, or a hub id")
    if embedded:
        return str(embedded.folder())
    _check_there(name, "model")
    return name


def check_hidden(name: str, model: Any, direction: Direction | None) -> None:
    """Refuse a direction of another hidden size."""
    if direction is not None and direction.hidden != hidden_size(model):
        raise InputError(
            f"the direction has hidden size {direction.hidden}; "
            f"the model '{name}' has {hidden_size(model)}"
        )


def _placement(options: LoadOptions) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` that say where the weights go."""
    where = find_device(options.device)
    if options.tensor_parallel:
        try:
            from transformers.distributed import DistributedConfig
        except ImportError:  # transformers before 5.18
            return {"tp_plan": "auto"}
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    if where.type == "cpu":
        return {}
    alone = options.device == "auto" and "LOCAL_RANK" not in os.environ
    return {"device_map": "auto" if alone else {"": where}}


def _quantization(options: LoadOptions) -> dict[str, Any]:
    """Return the option of ``from_pretrained`` that quantizes."""
    if options.load_in is None:
        return {}
    import transformers

    # both serve CPUs and GPUs; in 8 bits bitsandbytes rounds the activations too, and is faster on
    # GPUs alone. torchao keeps 4 bits in bytes, or in a layout of one kind of device.
    makers = ["bitsandbytes"]
    if options.load_in == "8bit":
        on_cpu = find_device(options.device).type == "cpu"
        makers.insert(0 if on_cpu else 1, "torchao")
    maker = next(filter(importlib.util.find_spec, makers), None)
    if maker is None:
        raise InputError(f"load_in='{options.load_in}' needs {' or '.join(makers)}: pip install it")
    config: Any
    if maker == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        python_logging.getLogger(maker).setLevel("ERROR")  # it tells every cast
        compute = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
        eight = options.load_in == "8bit"
        config = transformers.BitsAndBytesConfig(
            load_in_8bit=eight,
            load_in_4bit=not eight,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
        )
    return {"quantization_config": config}


def _check_there(name: str, what: str) -> None:
    """Refuse a path where nothing is, which transformers would look for on the hub."""
    if name.endswith(GGUF):
        if not Path(name).expanduser().is_file():
            raise InputError(f"{what} '{name}': there is no such file")
        return
    parent = os.path.dirname(name)
    # no hub id, or inside a folder that is there
    folder = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or os.path.isdir(parent)
    if folder and not os.path.isdir(name):
        raise InputError(f"{what} '{name}': there is no such folder")
