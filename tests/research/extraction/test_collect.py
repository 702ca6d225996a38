"""What is collected, against the model's own hidden states, one prompt at a time."""

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny_families
import torch
from tiny import FAMILIES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config

from refusal_kernels import Ablate, Direction, patch, toy
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.load import load
from refusal_kernels.hf.logits import last_logits
from refusal_kernels.research.extraction.collect import collect, mean_difference
from refusal_kernels.research.extraction.moments import Moments

HARMFUL = ["curse the lamp", "tell me how to hex a boat now please", "storm", "hex tea one two"]
HARMLESS = ["make tea", "please be kind and fix the box", "what is one plus two", "paint a cake"]
POSITIONS = 4


def inputs_of_blocks(model: Any, prompt: str) -> torch.Tensor:
    """float64 [layers, tokens, hidden] of one prompt alone: no padding, no batch.

    hidden_states[l] is the input of block l; the last one is after the final norm.
    """
    ids = torch.tensor(ChatFormat(tiny_tokenizer()).encode([prompt]))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    return torch.stack(states[:-1])[:, 0].double()


def plain_mean(model: Any, prompts: list[str], positions: int) -> torch.Tensor:
    return torch.stack([inputs_of_blocks(model, p)[:, -positions:] for p in prompts]).mean(0)


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 5e-6) -> None:
    """A float32 model on other batch shapes: a few ulps of activations of a few units."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_moments_are_of_the_block_inputs(family: str, batch_size: int) -> None:
    model = tiny_model(family)
    moments = collect(model, tiny_tokenizer(), HARMFUL, batch_size=batch_size)
    assert moments.shape == (3, POSITIONS, 64)
    assert (moments.count("harmful") == len(HARMFUL)).all()
    assert not moments.count("harmless").any()
    close(moments.mean("harmful"), plain_mean(model, HARMFUL, POSITIONS))


def test_the_last_layers_output_and_the_layers_are_not_mixed_up() -> None:
    model = tiny_model()
    embedded = model.get_input_embeddings()(
        torch.tensor(ChatFormat(tiny_tokenizer()).encode(["a"]))
    )
    first = collect(model, tiny_tokenizer(), ["a"]).mean("harmful")[0]
    assert torch.equal(first, embedded[0, -POSITIONS:].double())


def test_mean_difference_is_position_layer_hidden() -> None:
    model = tiny_model()
    seen: list[tuple[int, int]] = []
    candidates = mean_difference(
        model, tiny_tokenizer(), HARMFUL, HARMLESS, batch_size=3, model_name="tiny",
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    expected = plain_mean(model, HARMFUL, POSITIONS) - plain_mean(model, HARMLESS, POSITIONS)
    vectors = candidates.vectors
    assert vectors.dtype == torch.float32 and vectors.shape == (POSITIONS, 3, 64)
    assert list(candidates.positions) == [-4, -3, -2, -1] and list(candidates.layers) == [0, 1, 2]
    assert (candidates.model, candidates.method) == ("tiny", "mean_difference")
    assert candidates.template == "<s> <|user|> {instruction} <|end|> <|assistant|> answer :"
    close(vectors.double(), expected.transpose(0, 1))
    for mean, prompts in zip(candidates.means, (HARMFUL, HARMLESS), strict=True):
        close(mean.double(), plain_mean(model, prompts, POSITIONS).transpose(0, 1))
    assert not vectors[:, 0].any()  # the template's own tokens: the same embedding everywhere
    assert vectors[:, 1].any()
    assert seen == [(3, 8), (4, 8), (7, 8), (8, 8)]


def test_fewer_and_more_positions_than_the_template_has() -> None:
    model = tiny_model()
    one = collect(model, tiny_tokenizer(), HARMFUL, positions=1)
    close(one.mean("harmful"), plain_mean(model, HARMFUL, 1))
    # "storm" has 1 + 1 + 1 + 4 tokens: what would be padding is not counted
    many = collect(model, tiny_tokenizer(), HARMFUL, positions=9)
    lengths = torch.tensor([len(ids) for ids in ChatFormat(tiny_tokenizer()).encode(HARMFUL)])
    expected = [int((lengths >= 9 - slot).sum()) for slot in range(9)]
    assert many.count("harmful")[2].tolist() == expected and 0 < expected[0] < len(HARMFUL)
    close(many.mean("harmful")[:, -POSITIONS:], plain_mean(model, HARMFUL, POSITIONS))
    wide = collect(model, tiny_tokenizer(), ["storm"], positions=20)
    assert wide.count("harmful")[0].tolist() == [0] * 13 + [1] * 7


def test_a_state_goes_on(tmp_path: Any) -> None:
    model = tiny_model()
    whole = collect(model, tiny_tokenizer(), HARMFUL, batch_size=2)
    collect(model, tiny_tokenizer(), HARMLESS, batch_size=2, group=1, moments=whole)
    expected = mean_difference(model, tiny_tokenizer(), HARMFUL, HARMLESS, batch_size=2)
    assert torch.equal(whole.compute().mean_difference.float(), expected.vectors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    moments = collect(model, tiny_tokenizer(), HARMFUL)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-12
    close(moments.mean("harmful"), plain_mean(model, HARMFUL, POSITIONS), tolerance)


def test_logits_are_those_of_each_prompt_alone() -> None:
    model = tiny_model()
    logits = last_logits(model, tiny_tokenizer(), HARMFUL + HARMLESS, batch_size=3)
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    for row, prompt in zip(logits, HARMFUL + HARMLESS, strict=True):
        ids = torch.tensor(ChatFormat(tiny_tokenizer()).encode([prompt]))
        close(row, model(ids).logits[0, -1], 1e-5)


def test_the_head_is_given_what_is_contiguous() -> None:
    """Otherwise its weights are copied for every row, in bfloat16 on a CPU."""
    model, seen = tiny_model(), []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    last_logits(model, tiny_tokenizer(), HARMFUL)
    assert all(h.shape[1] == 1 and h.is_contiguous() for h in seen)
    assert len(seen[-1]) == len(HARMFUL)


@pytest.mark.parametrize("run", [collect, last_logits])
def test_positions_count_from_the_first_real_token(run: Any) -> None:
    # a rotary model would not show a shift, one with learned positions would
    model, seen = tiny_model(), {}
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True
    )
    run(model, tiny_tokenizer(), ["storm", "make tea now"])
    assert seen["attention_mask"].tolist() == [[1] * 9, [0, 0, *[1] * 7]]
    assert seen["position_ids"].tolist() == [[*range(9)], [0, 0, *range(7)]]


def test_a_system_prompt_changes_what_is_read() -> None:
    model = tiny_model()
    plain = last_logits(model, tiny_tokenizer(), ["make tea"])
    kind = last_logits(model, ChatFormat(tiny_tokenizer(), system="be kind"), ["make tea"])
    assert (plain - kind).abs().max() > 0.01


def test_hooks_are_gone_even_after_an_error() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())

    def fail(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, tiny_tokenizer(), HARMFUL, progress=fail)
    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        collect(model, tiny_tokenizer(), HARMFUL)
    handle.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bad_input_is_refused_before_any_pass() -> None:
    model, tokenizer = tiny_model(max_position_embeddings=32), tiny_tokenizer()
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for options, words in (
        ({"positions": 0}, "0 positions"),
        ({"group": 2}, "group 2"),
        ({"moments": Moments(3, 5, 64)}, r"need \(3, 4, 64\)"),
        ({"last_layer": 3}, "the last layer is 3; expected 0 to 2"),
    ):
        with pytest.raises(InputError, match=words):
            collect(model, tokenizer, HARMFUL, **options)
    with pytest.raises(InputError, match="no prompt"):
        collect(model, tokenizer, [])
    with pytest.raises(InputError, match="no prompt"):
        mean_difference(model, tokenizer, HARMFUL, [])
    with pytest.raises(InputError, match="the last layer is -1; expected 0 to 2"):
        mean_difference(model, tokenizer, HARMFUL, HARMLESS, last_layer=-1)
    gpt = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=47, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    )
    for call in (
        lambda: collect(gpt, tokenizer, ["make tea", "tea " * 39]),
        lambda: mean_difference(gpt, tokenizer, HARMFUL, ["make tea", "tea " * 39]),
    ):
        with pytest.raises(InputError, match=r"a prompt has 45 tokens .* has 32 positions"):
            call()
    with pytest.raises(InputError, match="Linear holds no list of decoder layers"):
        collect(torch.nn.Linear(2, 2), tokenizer, HARMFUL)


def test_nan_in_the_model_is_named() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight[5, 5] = float("nan")
    with pytest.raises(InputError, match="met NaN or infinity at layer 2, position -4"):
        mean_difference(model, tiny_tokenizer(), HARMFUL, HARMLESS)


# --- at scale ------------------------------------------------------------------------------------


def test_the_mean_differences_are_float64_sums() -> None:
    """Of what the very forward passes hold, read by other hooks, in passes to the very end."""
    model, tokenizer = load("toy", "cpu", "auto")
    sets = [list(toy.prompts(name, "train")[:100]) for name in ("harmful", "harmless")]
    chat, layers = ChatFormat(tokenizer), model.model.layers
    means = []
    for prompts in sets:
        sums = torch.zeros(len(layers), chat.positions, 128, dtype=torch.float64)

        def add(layer: int, stream: torch.Tensor, sums: torch.Tensor = sums) -> None:
            sums[layer] += stream[:, -chat.positions :].double().sum(0)

        hooks = [
            layer.register_forward_pre_hook(lambda _, args, i=i, add=add: add(i, args[0]))
            for i, layer in enumerate(layers)
        ]
        for batch in chat.batches(prompts, 8):
            positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                model(batch.input_ids, batch.attention_mask, position_ids=positions)
        for hook in hooks:
            hook.remove()
        means.append(sums / len(prompts))
    expected = (means[0] - means[1]).transpose(0, 1)

    found = mean_difference(model, tokenizer, *sets, batch_size=8).vectors
    error = (found.double() - expected).abs()
    # a float32 number is within 6e-8 of what it stands for; 1e-12: of a difference that is none
    assert (error <= 1e-6 * expected.abs() + 1e-12).all()
    again = mean_difference(model, tokenizer, *sets, batch_size=8).vectors
    assert torch.equal(found, again)


@pytest.mark.parametrize("last_layer", [0, 1, 2])
def test_what_lies_above_the_last_layer_is_not_run(last_layer: int) -> None:
    model = tiny_model()
    whole = collect(model, tiny_tokenizer(), HARMFUL, batch_size=3)

    for module in (*model.model.layers[last_layer:], model.model.norm, model.lm_head):
        for part in module.modules():
            part.register_forward_hook(lambda *_: pytest.fail("it ran"))
    part = collect(model, tiny_tokenizer(), HARMFUL, batch_size=3, last_layer=last_layer)
    assert part.shape == (last_layer + 1, POSITIONS, 64)
    for read in ("count", "mean", "variance"):
        of_part, of_whole = (getattr(m, read)("harmful") for m in (part, whole))
        assert torch.equal(of_part, of_whole[: last_layer + 1])
    candidates = mean_difference(model, tiny_tokenizer(), HARMFUL, HARMLESS, last_layer=last_layer)
    assert candidates.vectors.shape == (POSITIONS, last_layer + 1, 64)


OTHERS = "gpt2 bloom falcon gptj gemma2 gemma3n_text mixtral mamba phi3 qwen3_next olmo2 cohere2"


@pytest.mark.parametrize("family", OTHERS.split())
@pytest.mark.filterwarnings("ignore")
def test_other_families_are_read_up_to_any_layer(family: str) -> None:
    from refusal_kernels.hf.batches import Batch
    from refusal_kernels.hf.forward import model_inputs, read_inputs
    from refusal_kernels.hf.model import decoder_layers

    model = tiny_families.build(family)
    layers = decoder_layers(model)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = 0
    batch = Batch([0, 1, 2], torch.randint(8, 100, (3, 9)), mask)
    expected: dict[int, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: expected.update(
                {i: (args[0] if args else kwargs["hidden_states"]).clone()}
            ),
            with_kwargs=True,
        )
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        model(**model_inputs(batch, torch.device("cpu")), use_cache=False)
    for hook in hooks:
        hook.remove()
    for last in range(len(layers)):
        found: dict[int, torch.Tensor] = {}
        read_inputs(model, batch, last, lambda i, x, into=found: into.update({i: x.clone()}))
        assert list(found) == list(range(last + 1))
        assert all(torch.equal(found[i], expected[i]) for i in found)


def test_a_layer_that_is_not_called_is_named() -> None:
    """Without an image Mllama skips its layers of cross-attention."""
    model = tiny_families.build("mllama")
    with pytest.raises(InputError, match=r"MllamaForCausalLM does not call layer 3 .* such as 2"):
        collect(model, tiny_tokenizer(), ["make tea"])


def test_a_patched_model_is_read_as_it_runs() -> None:
    model, direction = tiny_model(), Direction(torch.randn(64))
    plain = collect(model, tiny_tokenizer(), HARMFUL)
    with patch(model, Ablate(direction)):
        ablated = collect(model, tiny_tokenizer(), HARMFUL)
        logits = last_logits(model, tiny_tokenizer(), HARMFUL)  # the cut pass left nothing behind
    with patch(model, Ablate(direction)):
        assert torch.equal(logits, last_logits(model, tiny_tokenizer(), HARMFUL))
    unit = direction.unit.double()
    assert (ablated.mean("harmful") @ unit).abs().max() < 1e-6
    assert (plain.mean("harmful") @ unit).abs().max() > 1e-2


@pytest.mark.parametrize("how", ["layers", "decoder", "model", "offloaded"])
def test_compiled_and_offloaded_models(how: str) -> None:
    """Compiled code would not see the hooks; what is offloaded is fetched as the pass goes."""
    model = tiny_model()
    expected = collect(model, tiny_tokenizer(), HARMFUL, last_layer=1)
    if how == "layers":
        for layer in model.model.layers:
            layer.compile()
    elif how == "decoder":
        model.model.compile()
    elif how == "model":
        model = torch.compile(model)
    else:
        model = accelerate.cpu_offload(model, torch.device("cpu"))
    for _ in range(2):
        found = collect(model, tiny_tokenizer(), HARMFUL, last_layer=1)
        assert torch.equal(found.mean("harmful"), expected.mean("harmful"))
    assert all(p.is_meta for p in model.parameters()) == (how == "offloaded")


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "state.safetensors"
    whole = mean_difference(model, tiny_tokenizer(), HARMFUL, HARMLESS, batch_size=1).vectors
    seen: list[int] = []

    def stop(done: int, _: int) -> None:
        seen.append(done)
        if done == 5:
            raise KeyboardInterrupt

    arguments = (model, tiny_tokenizer(), HARMFUL, HARMLESS)
    with pytest.raises(KeyboardInterrupt):
        mean_difference(*arguments, batch_size=1, checkpoint=path, progress=stop)
    again = mean_difference(
        *arguments, batch_size=1, checkpoint=path, progress=lambda done, _: seen.append(done)
    ).vectors
    assert seen == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert torch.equal(whole, again)
    # a finished run says it again, without a pass
    passes: list[Any] = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: passes.append(_))
    assert torch.equal(whole, mean_difference(*arguments, batch_size=1, checkpoint=path).vectors)
    assert len(passes) == 1  # the probe


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """Whatever it is that differs, it is named, and nothing has changed."""
    path = tmp_path / "state.safetensors"

    def run(model: Any, prompts: Any = HARMFUL, chat: Any = None, **settings: Any) -> Moments:
        chat = chat or tiny_tokenizer()
        return collect(model, chat, prompts, **{"batch_size": 2, **settings}, checkpoint=path)

    model = tiny_model()
    run(model)
    before = path.read_bytes()
    edited = tiny_model()
    edited.model.layers[2].mlp.down_proj.weight[3, 3] += 1e-3  # no input of a layer depends on it
    hooked = tiny_model()
    hooked.model.layers[0].register_forward_hook(lambda _, args, out: out * 1.001)
    cases: list[tuple[str, Any]] = [
        ("set of prompts", lambda: run(model, HARMFUL[::-1])),
        ("set of prompts", lambda: run(model, chat=ChatFormat(tiny_tokenizer(), "be kind"))),
        ("batch size", lambda: run(model, batch_size=3)),
        ("shape", lambda: run(model, positions=2)),
        ("shape", lambda: run(model, last_layer=1)),
        ("set of groups", lambda: run(model, groups=("harmful", "other"))),
        ("set of prompts", lambda: run(model, group=1)),
        ("model", lambda: run(edited)),
        ("another patch, machine", lambda: run(hooked)),
        ("model", lambda: run(tiny_model(dtype=torch.float64))),
    ]
    for name, case in cases:
        with pytest.raises(InputError, match=f"another run, .*{name}.*remove it to begin anew"):
            case()
    assert path.read_bytes() == before
    run(model)

    for content, message in (
        (before[:-9], "damaged"),
        (b"", "damaged"),
        (before.replace(rb'"batches\": \"2', rb'"batches\": \"9'), "no checkpoint of this run"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            run(model)
        assert path.read_bytes() == content
    with pytest.raises(InputError, match="cannot be written"):
        collect(model, tiny_tokenizer(), HARMFUL, checkpoint=tmp_path / "nowhere" / "state")
    with pytest.raises(InputError, match="no moments beside it"):
        collect(model, tiny_tokenizer(), HARMFUL, checkpoint=path, moments=Moments(3, 4, 64))
