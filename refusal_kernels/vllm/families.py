"""Which architectures are steered, and where the residual adds of a vLLM model are.

Most families let the norm that follows an add do it, ``hidden, residual = self.norm(hidden,
residual)``; others add in the layer. `refusal_kernels.vllm.check` checks the tables at start-up; an
architecture in neither is refused.
"""

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

from torch import nn

from refusal_kernels.errors import InputError
from refusal_kernels.hf.model import layer_list
from refusal_kernels.patching.places import base_class
from refusal_kernels.patching.rewrite import steered

# vLLM's code fuses every add into a norm. tests/vllm compares the tokens of the first with Hugging
# Face's; the second have code of the same shape.
COMPARED = """
    Gemma2ForCausalLM Gemma3ForCausalLM GemmaForCausalLM LlamaForCausalLM MistralForCausalLM
    MixtralForCausalLM Phi3ForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM
"""
ALIKE = """
    ApertusForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM GptOssForCausalLM InternLM2ForCausalLM InternLM3ForCausalLM
    OlmoeForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM
"""
FUSED = frozenset((COMPARED + ALIKE).split())
# The layer's forward adds: vLLM's code, or its Transformers backend.
ADDING = frozenset("GPT2LMHeadModel GPTNeoXForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM".split())

START, ADD, NORM = "start", "add", "norm"
ATTN_THEN_MLP = (frozenset({"attn"}), frozenset({"mlp"}))


@dataclass
class EnginePlace:
    """One place where the stream is written.

    Attributes
    ----------
    name
        "embed", "layers.3.attn" and the like; with a fused norm, after what it adds.
    kind
        START: the input of the first layer; ADD: in a layer's forward; NORM: in a norm.
    module
        The layer, or the norm.
    block, writers, feeds
        As `refusal_kernels.Intervention.meets` takes them.
    add
        The number of the add in the layer's rewritten forward.
    """

    name: str
    kind: str
    module: nn.Module
    block: int | None = None
    writers: frozenset[str] = frozenset()
    feeds: int | None = None
    add: int = 0


def architecture_of(model_config: Any) -> str:
    """Return the class name of an engine's model.

    Raises
    ------
    InputError
        If the architecture is in no table.
    """
    name: str = (model_config.hf_config.architectures or [model_config.architecture])[0]
    if name not in FUSED | ADDING:
        raise InputError(
            f"vLLM's {name} cannot be steered; the architectures that can: "
            f"{', '.join(sorted(FUSED | ADDING))}"
        )
    return name


def writers_of(model_config: Any) -> tuple[frozenset[str], ...]:
    """Return what is added at each place of a block, before the model is loaded."""
    if getattr(model_config.hf_config, "use_parallel_residual", False):  # GPT-NeoX: in one sum
        return (frozenset({"attn", "mlp"}),)
    return ATTN_THEN_MLP


def find_places(model: nn.Module, architecture: str) -> list[EnginePlace]:
    """Return the places of a model, or of this rank's part of it, in the order of the forward.

    Raises
    ------
    InputError
        If the model's code is not as the tables say of its architecture.
    """
    layers_at = layer_list(model)
    if layers_at is None:
        raise InputError(f"{architecture} has no list of decoder layers, so it cannot be steered")
    path, layers = layers_at
    local = [(k, la) for k, la in enumerate(layers) if type(la).__name__ != "PPMissingLayer"]
    if not local:
        return []
    places = [EnginePlace("embed", START, local[0][1], feeds=0)] if local[0][0] == 0 else []
    if architecture in ADDING:
        for number, layer in local:
            for k, add in enumerate(steered(base_class(layer)).adds):
                if add.live(layer):
                    name = f"layers.{number}.{'+'.join(sorted(add.writers)) or 'add'}"
                    places.append(EnginePlace(name, ADD, layer, number, add.writers, None, k))
            places[-1].feeds = number + 1 if number + 1 < len(layers) else None
        return places
    for number, layer in local:
        norms = _fused_norms(layer)
        if len(norms) != 2:
            raise InputError(
                f"{type(layer).__name__} has {len(norms)} norms that add; expected 2, one after "
                "attention and one after the MLP"
            )
        if number > 0:  # the first layer's input norm has nothing to add
            places.append(_after_mlp(number - 1, norms[0], number))
        places.append(
            EnginePlace(f"layers.{number}.attn", NORM, norms[1], number, frozenset({"attn"}))
        )
    if local[-1][0] == len(layers) - 1:
        parent = model.get_submodule(path.rpartition(".")[0])
        final = _fused_norms(parent)
        if len(final) != 1:
            raise InputError(f"{type(parent).__name__} has {len(final)} final norms; expected 1")
        places.append(_after_mlp(len(layers) - 1, final[0], None))
    return places


def whole_model(places: list[EnginePlace], layers: int) -> list[EnginePlace]:
    """Return the places of all ranks of a pipeline, from those of one: without their modules."""
    adds = list(dict.fromkeys(p.writers for p in places if p.kind == ADD))
    nothing = nn.Identity()
    all_places = [EnginePlace("embed", START, nothing, feeds=0)]
    for block in range(layers):
        all_places += [
            EnginePlace(f"layers.{block}", ADD, nothing, block, w) for w in adds or ATTN_THEN_MLP
        ]
        all_places[-1].feeds = block + 1 if block + 1 < layers else None
    return all_places


def _after_mlp(block: int, norm: nn.Module, feeds: int | None) -> EnginePlace:
    return EnginePlace(f"layers.{block}.mlp", NORM, norm, block, frozenset({"mlp"}), feeds)


def _fused_norms(module: nn.Module) -> list[nn.Module]:
    """Return the norms that a module's forward calls as ``a, b = self.norm(a, b)``, in its order.

    A forward without such a call may call that of its parent class, which is read then.
    """
    for cls in type(module).__mro__:
        if "forward" in cls.__dict__ and (names := _called_with_residual(cls, module)):
            return [getattr(module, name) for name in names]
    return []


def _called_with_residual(cls: type, module: nn.Module) -> list[str]:
    try:
        source = inspect.getsource(inspect.unwrap(cls.__dict__["forward"]))
    except (OSError, TypeError):
        return []
    names: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        call, target = node.value, node.targets[0]
        pair = isinstance(target, ast.Tuple) and len(target.elts) == 2
        if not pair or len(call.args) != 2 or not isinstance(call.func, ast.Attribute):
            continue
        of_self = isinstance(call.func.value, ast.Name) and call.func.value.id == "self"
        norm: Any = getattr(module, call.func.attr, None)
        if of_self and type(norm).__name__ in ("RMSNorm", "GemmaRMSNorm"):
            names.append((node.lineno, call.func.attr))
    return list(dict.fromkeys(name for _, name in sorted(names)))
