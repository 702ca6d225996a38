"""Steering beside what else vLLM does for a request: sampling, n, logprobs, adapters."""

import json

import pytest
import torch
from families import HIDDEN, make
from reference import greedy, hugging_face, prompts
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

import refusal_kernels as rk
from refusal_kernels import toy
from refusal_kernels.hf.chat import ChatFormat

TOKENS, RANK = 12, 4
PROGRAMS = {"ablate": {"ablate": "r"}, "add": {"add": "r", "coefficient": 2.0, "block_input": 2}}


@pytest.fixture(scope="module")
def path(folder):
    return make("llama", folder)


def generate(llm, asked, lora=None, **options):
    """Return the outputs of (prompt, steer) pairs."""
    params = [
        SamplingParams(
            max_tokens=TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if steer is None else {"steer": steer},
            **options,
        )
        for _, steer in asked
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    return llm.generate(inputs, params, use_tqdm=False, lora_request=lora)


def tokens_of(outputs):
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


def test_plain_samples_are_those_of_an_engine_without_the_plugin(path, steering, engines):
    """The start-up check draws nothing from vLLM's seeded generator."""
    asked = [(prompt, None) for prompt in prompts(4)]
    without = tokens_of(generate(engines(path, None), asked, temperature=1.0))
    llm = engines(path, steering(programs=PROGRAMS))
    assert tokens_of(generate(llm, asked, temperature=1.0)) == without


def test_several_samples_and_prompt_logprobs(path, directions, steering, engines):
    model, texts = hugging_face(path), prompts(2, seed=41)
    llm = engines(path, steering(programs=PROGRAMS))
    asked = [(texts[0], "ablate"), (texts[0], None), (texts[1], "ablate")]
    several = tokens_of(generate(llm, asked, n=2, temperature=1.0, seed=7))
    each = [tokens_of(generate(llm, asked, temperature=1.0, seed=seed)) for seed in (7, 8)]
    assert several == [[*one, *two] for one, two in zip(*each, strict=True)]
    assert several[0] != several[1]
    for (prompt, steer), output in zip(
        asked, generate(llm, asked, temperature=0.0, prompt_logprobs=0), strict=True
    ):
        with rk.patch(model, rk.Ablate(directions["r"], 1.0 if steer else 0.0)), torch.no_grad():
            logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        wanted = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        scored = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        given = torch.tensor([at[token].logprob for token, at in scored])
        assert torch.allclose(given, wanted, atol=1e-4)


@pytest.fixture(scope="module")
def adapter(folder):
    """A LoRA adapter of every query and output projection, and what it adds to the weights."""
    generator = torch.Generator().manual_seed(2)
    tensors, added = {}, {}
    for layer in range(4):
        for name in ("q_proj", "o_proj"):
            down = torch.randn(RANK, HIDDEN, generator=generator) * HIDDEN**-0.5
            up = torch.randn(HIDDEN, RANK, generator=generator) * RANK**-0.5
            module = f"model.layers.{layer}.self_attn.{name}"
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
            added[f"{module}.weight"] = up @ down
    path = folder / "adapter"
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    config |= {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path, added


def test_an_adapter_beside_steering(path, adapter, directions, steering, engines):
    adapter_path, added = adapter
    llm = engines(path, steering(programs=PROGRAMS), enable_lora=True, max_lora_rank=8, max_loras=1)
    asked = [(prompt, steer) for prompt in prompts(2) for steer in ("ablate", "add", None)]
    model = hugging_face(path)
    edits = {
        "ablate": [rk.Ablate(directions["r"])],
        "add": [rk.Add(directions["r"], 2.0, block_input=2)],
        None: [],
    }
    for lora in (None, LoRARequest("one", 1, str(adapter_path))):
        if lora is not None:
            with torch.no_grad():
                for name, change in added.items():
                    model.get_parameter(name).add_(change)
        wanted = [[greedy(model, prompt, TOKENS, edits[steer])] for prompt, steer in asked]
        assert tokens_of(generate(llm, asked, lora, temperature=0.0)) == wanted


def test_a_structured_output_is_chosen_by_the_steered_logits(folder, engines):
    choice = ["i", "sure,"]  # the first words of a refusal and of an answer
    with set_current_vllm_config(VllmConfig()):
        model, tokenizer = rk.load("toy", "cpu")
        classes = [toy.prompts(name, "train")[:24] for name in ("harmful", "harmless")]
        rk.mean_difference(model, tokenizer, *classes).at(5, -1).save(folder / "toy.safetensors")
    settings = {"directions": {"toy": str(folder / "toy.safetensors")}}
    settings["programs"] = {"ablate": {"ablate": "toy"}}
    llm = engines(str(toy.PATH), {"refusal_kernels": settings}, skip_tokenizer_init=False)
    params = [
        SamplingParams(
            temperature=0.0,
            structured_outputs=StructuredOutputsParams(choice=choice),
            extra_args=steer,
        )
        for steer in (None, {"steer": "ablate"}, None)
    ]
    prompts = [toy.prompts("harmful", "test")[0]] * 2 + [toy.prompts("harmless", "test")[1]]
    inputs = [{"prompt_token_ids": ids} for ids in ChatFormat.of(tokenizer).encode(prompts)]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    assert [output.outputs[0].text.strip() for output in outputs] == ["i", "sure,", "sure,"]
