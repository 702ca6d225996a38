"""All scores of all candidates, and the winner, against the protocol in float64."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from protocol import Table, discarded, measure, winner
from transformers import GemmaConfig, GemmaForCausalLM

from refusal_kernels import toy
from refusal_kernels.direction import Candidates
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.load import load
from refusal_kernels.interventions import Ablate, Slot
from refusal_kernels.research.extraction.collect import mean_difference
from refusal_kernels.research.selection import measurement, scoring
from refusal_kernels.research.selection.algorithm import Selection, select
from refusal_kernels.research.selection.measurement import Measurement
from refusal_kernels.research.selection.replay import Replay

FAMILIES = [*tiny.FAMILIES, "gemma"]
LAYERS = 5
# of many lengths, some shared by harmful and harmless ones
HARMFUL = ["curse the lamp", "tell me how to hex a boat now please", "storm", "hex tea one two"]
HARMLESS = [
    *("make tea", "please be kind and fix the box", "what is one plus two", "paint a cake"),
    "sure",
]
TOKENS = [7, 9]


LONG = {"system": "please be kind and brief"}  # a template whose beginning is worth keeping


def tokenizer_of(system: str = "") -> Any:
    """The tiny tokenizer; with a system prompt in its template, which all prompts begin with."""
    tokenizer = tiny.tiny_tokenizer()
    if system:
        first = f"{{{{ bos_token }}}} <|system|> {system} <|end|>"
        tokenizer.chat_template = tiny.TEMPLATE.replace("{{ bos_token }}", first)
    return tokenizer


def family_model(family: str) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(tiny.FAMILIES, "gemma", (GemmaConfig, GemmaForCausalLM, {}))
        return tiny.tiny_model(family, num_hidden_layers=LAYERS)


def candidates_of(model: Any, **template: str) -> torch.Tensor:
    return 3 * mean_difference(model, tokenizer_of(**template), HARMFUL, HARMLESS).vectors


def plain(model: Any, candidates: torch.Tensor, **template: str) -> Table:
    wide = copy.deepcopy(model).double()
    return measure(wide, tokenizer_of(**template), candidates, HARMFUL, HARMLESS, TOKENS)


def thresholds(table: Table, layers: int) -> dict[str, float]:
    """Such that each filter discards some candidates."""
    left = [found for at, found in table.items() if not math.isnan(found.kl) and at[1] < layers]
    kls, induces = (sorted(found[k] for found in left) for k in (2, 1))
    return {"kl": sum(kls[-4:-2]) / 2, "induce": sum(induces[1:3]) / 2}


def check(selection: Selection, table: Table, layers: int, **limits: float) -> None:
    measured = [row for row in selection.candidates if row.kl is not None]
    assert len(selection.candidates) == len(table)
    for row in selection.candidates:
        at = row.position, row.layer
        assert (row.discarded is not None) == discarded(at, table[at], layers, **limits)
    for row in measured:
        scores = row.bypass, row.induce, row.kl
        assert scores == pytest.approx(table[row.position, row.layer], abs=1e-4)
    # what was not measured is what two of the filters discard whatever the scores are
    assert {(row.position, row.layer) for row in measured} == {
        at
        for at, found in table.items()
        if at[1] < int(0.8 * layers) and not math.isnan(found.bypass)
    }
    assert (selection.position, selection.layer) == winner(table, layers, **limits)


def run(model: Any, candidates: torch.Tensor, system: str = "", **options: Any) -> Selection:
    options = {"refusal_tokens": TOKENS, "kl_threshold": 1e9, "induce_threshold": -1e9, **options}
    made = Candidates(candidates)
    return select(model, tokenizer_of(system), made, HARMFUL, HARMLESS, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_five_families(family: str) -> None:
    model = family_model(family)
    candidates = candidates_of(model)
    table = plain(model, candidates)
    limits = thresholds(table, int(0.8 * LAYERS))
    reasons = set()
    for batch_size in (32, 3):
        selection = run(
            model, candidates, batch_size=batch_size,
            kl_threshold=limits["kl"], induce_threshold=limits["induce"],
        )  # fmt: skip
        check(selection, table, LAYERS, **limits)
        reasons |= {(row.discarded or "").split(" ")[0] for row in selection.candidates}
    assert reasons == {"", "zero", "layer", "kl", "induce"}


@pytest.mark.parametrize("family", FAMILIES)
def test_five_families_after_a_long_prefix(family: str) -> None:
    model = family_model(family)
    candidates = candidates_of(model, **LONG)
    table = plain(model, candidates, **LONG)
    for batch_size in (32, 3):
        selection = run(model, candidates, **LONG, batch_size=batch_size)
        check(selection, table, LAYERS, kl=1e9, induce=-1e9)


@pytest.fixture(scope="module")
def toy_model() -> tuple[Any, Any]:
    return load("toy", "cpu", "auto")


def test_the_toy_model(toy_model: tuple[Any, Any]) -> None:
    model, tokenizer = toy_model
    train, validation = (
        {name: toy.prompts(name, split)[:count] for name in ("harmful", "harmless")}
        for split, count in (("train", 48), ("validation", 8))
    )
    candidates = mean_difference(model, tokenizer, **train)
    selection = select(model, tokenizer, candidates, **validation)
    tokens = selection.refusal_tokens  # found from the model's own refusals
    wide = copy.deepcopy(model).double()
    table = measure(wide, tokenizer, candidates.vectors, **validation, tokens=tokens)
    check(selection, table, 8)


@pytest.fixture(scope="module")
def case() -> tuple[Any, torch.Tensor, Table]:
    model = family_model("qwen3")
    candidates = candidates_of(model)
    return model, candidates, plain(model, candidates)


by_layer = Measurement._by_layer


class Weaker(Ablate):
    def slots(self, strength: float) -> list[Slot]:
        return super().slots(0.999 * strength)


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        (measurement, "Ablate", Weaker),
        (measurement, "Ablate", lambda d: Ablate(d, sites=("attn", "mlp"))),  # not the embedding
        (measurement, "kl_divergence", lambda p, q: scoring.kl_divergence(q, p)),
        (scoring, "SCORE_EPS", 1e-3),
        (scoring, "KL_EPS", 1e-3),
        (Measurement, "_by_layer", lambda self: {k + 1: v for k, v in by_layer(self).items()}),
    ],
)
def test_a_wrong_implementation_is_found(
    case: tuple[Any, torch.Tensor, Table], monkeypatch: Any, where: Any, name: str, wrong: Any
) -> None:
    model, candidates, table = case
    check(run(model, candidates), table, LAYERS, kl=1e9, induce=-1e9)
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check(run(model, candidates), table, LAYERS, kl=1e9, induce=-1e9)


# --- what makes it fast, counted and not timed


@pytest.mark.parametrize("template", [{}, LONG], ids=["whole", "prefix"])
def test_nothing_is_run_that_no_score_needs(
    case: tuple[Any, torch.Tensor, Table], template: dict[str, str]
) -> None:
    model, candidates, _ = case
    chat = ChatFormat(tokenizer_of(**template))
    # <s> <|system|> please be kind and brief <|end|> <|user|>
    prefix = 9 if template else 0
    tokens = [sum(map(len, chat.encode(prompts))) for prompts in (HARMFUL, HARMLESS)]
    # without the prefix, of which every prompt has one
    tokens = [
        count - prefix * len(prompts)
        for count, prompts in zip(tokens, (HARMFUL, HARMLESS), strict=True)
    ]
    longest = max(map(len, chat.encode(HARMLESS))) - prefix
    seen = [0] * LAYERS
    heads = set()

    def count(layer: int) -> Any:
        def hook(_: Any, args: Any, __: Any) -> None:
            seen[layer] += args[0].shape[:-1].numel()

        return hook

    hooks = [block.mlp.register_forward_hook(count(k)) for k, block in enumerate(layers_of(model))]
    hooks.append(model.lm_head.register_forward_hook(lambda _, a, __: heads.add(a[0].shape[1])))
    try:
        run(model, candidates, **template)
    finally:
        for hook in hooks:
            hook.remove()
    positions, wanted = 4, range(1, 4)  # layer 0 is zero, layer 4 is the last fifth
    for layer in range(LAYERS):
        below = sum(start <= layer for start in wanted)
        expected = sum(tokens)  # unmodified
        expected += positions * len(wanted) * sum(tokens)  # ablated
        expected += positions * below * tokens[1]  # added
        expected += tokens[1] if layer < max(wanted) else 0  # inputs of the layers kept
        expected += (2 + below + (layer < max(wanted))) * longest  # whether that works
        if prefix:
            longest_of_all = max(map(len, chat.encode(HARMFUL + HARMLESS)))
            expected += prefix + longest_of_all + longest_of_all - prefix  # whether it serves
            expected += positions * (len(wanted) + below) * prefix  # under every candidate
            expected += prefix if layer < max(wanted) else 0  # its inputs of the layers kept
        assert seen[layer] == expected, f"layer {layer}"
    assert heads == {1}  # logits at the last position alone


def layers_of(model: Any) -> Any:
    return model.model.layers


@pytest.fixture
def entangled(monkeypatch: Any) -> Iterator[Any]:
    """A model whose layer 3 reads what layer 0 has left, beside the stream."""
    found: list[Any] = []

    def entangle(model: Any) -> Any:
        left: list[torch.Tensor] = []

        def leave(_: Any, args: Any, out: torch.Tensor) -> None:
            left[:] = [out]

        def take(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            return out + left[0]

        model.model.layers[0].mlp.register_forward_hook(leave)
        model.model.layers[3].mlp.register_forward_hook(take)
        return model

    class Seen(Replay):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self.layers)

    monkeypatch.setattr(measurement, "Replay", Seen)
    model = entangle(family_model("llama"))
    # a deep copy would share the hooks' tensors
    model.plain_copy = lambda: entangle(family_model("llama")).double()
    yield model
    assert found == [set()]  # from no layer: all start at the embedding


def test_layers_that_share_more_than_the_stream(entangled: Any) -> None:
    candidates = candidates_of(entangled)
    table = measure(
        entangled.plain_copy(), tiny.tiny_tokenizer(), candidates, HARMFUL, HARMLESS, TOKENS
    )
    check(run(entangled, candidates), table, LAYERS, kl=1e9, induce=-1e9)


def test_layers_that_return_tuples(case: tuple[Any, torch.Tensor, Table]) -> None:
    """As those of older families, whose decoder takes the first of what they return."""
    model = copy.deepcopy(case[0])
    cls = type(layers_of(model)[0])

    class Tupled(cls):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out = super().__call__(*args, **kwargs)
            assert isinstance(out, tuple)
            return out[0]

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return (cls.forward(self, *args, **kwargs),)

    chat = ChatFormat(tiny.tiny_tokenizer())
    ids = chat.encode(HARMLESS)[1]

    def forward(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids]), use_cache=False).logits[:, -1]

    inputs: dict[int, torch.Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, k=k: inputs.__setitem__(k, args[0]))
        for k, block in enumerate(layers_of(model))
    ]
    forward(ids)
    for hook in hooks:
        hook.remove()
    del inputs[0]
    for block in layers_of(model):
        block.__class__ = Tupled
    assert Replay(model, forward, ids, inputs).layers == {1, 2, 3, 4}
    assert all("forward" not in block.__dict__ for block in layers_of(model))
