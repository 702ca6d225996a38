"""What transformers loads a chat model as, also where it reads images too."""

from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_json

TEMPLATE_FILE = "chat_template.json"  # of a processor, where it is not beside the tokenizer's files


def auto_class(config: Any) -> Any:
    """Return the class that makes a model of its configuration, or loads it.

    Many chat models are listed as models of images and text alone; text goes through their language
    model as through any other.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    kind = type(config)
    by_text = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    by_text = by_text or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    by_images = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if by_images and not by_text else AutoModelForCausalLM


def load_tokenizer(path: str, **source: Any) -> Any:
    """Load a tokenizer, with the chat template of its processor if it has none itself."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    tokenizer = AutoTokenizer.from_pretrained(path, **source)
    if getattr(tokenizer, "chat_template", "") is None:
        where = {name: source[name] for name in ("revision", "local_files_only") if name in source}
        file = cached_file(
            path,
            TEMPLATE_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **where,
        )
        if file is not None:
            document = read_json(file)
            template = document.get("chat_template") if isinstance(document, dict) else None
            if not isinstance(template, str):
                raise InputError(f"{file} holds no chat template; expected one as text")
            tokenizer.chat_template = template
    return tokenizer
