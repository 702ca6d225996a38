"""The tokens of patched Hugging Face models, and the tokens that an engine serves."""

import contextlib
from typing import Any

import torch
import transformers
from families import VOCABULARY
from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config

import refusal_kernels as rk

TOKENS = 8  # to generate; V2's interpreted kernels take 80 ms for each
PROGRAMS: dict[str, Any] = {
    "ablate": {"ablate": "r"},
    "half": {"ablate": "r", "strength": 0.5},
    "add": {"add": "r", "coefficient": 2.0, "block_input": 2},
    "clamp": {"clamp": "r", "high": 0.0},
    "rotate": {"rotate": "r", "b2": "t", "angle": 60.0},
    "two": [{"ablate": "r", "layers": [1, 2]}, {"set": "t", "value": 1.0, "sites": ["mlp"]}],
}


def programs_for(family: str) -> dict[str, Any]:
    """Return all but those that ask for one of two writers whose outputs a family adds at once."""
    return {k: v for k, v in PROGRAMS.items() if (family, k) != ("neox", "two")}


def interventions(program: Any, directions: dict[str, rk.Direction]) -> list[rk.Intervention]:
    """Read a program as `rk.patch` takes it."""
    items = program if isinstance(program, list) else [program]
    return [rk.Intervention.from_dict(item, directions) for item in items]


def hugging_face(path: str) -> Any:
    """Load a saved model."""
    # without it vLLM replaces parts of classes that one of its engines has served
    with set_current_vllm_config(VllmConfig()):
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()


def greedy(
    model: Any, prompt: list[int], tokens: int, interventions: Any = (), strength: float = 1.0
) -> list[int]:
    """Continue a prompt greedily with a patched model."""
    patched = rk.patch(model, *interventions) if interventions else contextlib.nullcontext()
    with patched as handle, torch.inference_mode():
        if handle is not None and strength != 1.0:
            handle.strength = [strength * i.strength for i in interventions]
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def prompts(count: int = 4, seed: int = 3, longest: int = 30) -> list[list[int]]:
    """Make prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def served(llm: Any, asked: list[tuple[list[int], Any]], tokens: int = TOKENS) -> list[list[int]]:
    """Generate greedily, all requests at once; ``asked`` has (prompt, steer) pairs."""
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            min_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if steer is None else {"steer": steer},
        )
        for _, steer in asked
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


Case = tuple[str, float]  # program, strength
Texts = dict[Case, list[list[int]]]  # one for each of the prompts


def expected(family: str, path: str, directions: dict[str, rk.Direction]) -> Texts:
    """Return the patched Hugging Face model's tokens, by case."""
    model = hugging_face(path)
    cases = {(name, 1.0): program for name, program in programs_for(family).items()}
    cases |= {(name, 0.7): PROGRAMS[name] for name in ("ablate", "rotate")}
    cases["none", 1.0] = []
    return {
        (name, strength): [
            greedy(model, prompt, TOKENS, interventions(program, directions), strength)
            for prompt in prompts()
        ]
        for (name, strength), program in cases.items()
    }


def compare(llm: Any, wanted: Texts) -> None:
    """Serve all cases in one batch, and compare the tokens."""
    asked = [
        (prompt, {"program": name, "strength": strength})
        for name, strength in wanted
        for prompt in prompts()
    ]
    answers = iter(served(llm, asked))
    for case, texts in wanted.items():
        assert [next(answers) for _ in texts] == texts, case
    assert len({str(texts) for texts in wanted.values()}) >= 6  # the programs do differ
