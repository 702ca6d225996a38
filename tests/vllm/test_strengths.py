"""How strong a request may be: none that is served can ruin those that come later."""

import math

import pytest
import torch
from families import add_tokenizer, make
from reference import prompts, served
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams

from refusal_kernels.vllm.frontend import catalog_of

PROGRAMS = {
    "ablate": {"ablate": "r"},
    "add": {"add": "r", "coefficient": 2.0, "block_input": 2},
    "everywhere": {"add": "t", "sites": "all"},
    "clamp": {"clamp": "r", "high": 0.0},
    "rotate": {"rotate": "r", "b2": "t", "angle": 120.0},
}


@pytest.fixture(scope="module")
def path(folder):
    return make("llama", folder)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_the_strongest_requests_leave_later_ones_alone(dtype, path, steering, engines):
    few = {"block_size": 32, "num_gpu_blocks_override": 8, "enable_prefix_caching": False}
    llm = engines(path, steering(programs=PROGRAMS), dtype=dtype, **few)
    plain = [(prompt, None) for prompt in prompts(4, seed=41, longest=40)]
    before = served(llm, plain)
    for name, program in catalog_of(llm).programs.items():
        for strength in program.strengths:
            steer = {"program": name, "strength": strength}
            params = SamplingParams(
                temperature=0, max_tokens=8, logprobs=1, detokenize=False, ignore_eos=True,
                extra_args={"steer": steer},
            )  # fmt: skip
            asked = [{"prompt_token_ids": prompt} for prompt, _ in plain]
            for output in llm.generate(asked, params, use_tqdm=False):
                tokens = output.outputs[0].logprobs
                assert all(math.isfinite(p.logprob) for t in tokens for p in t.values()), steer
            beyond = {"program": name, "strength": strength * 1.01}
            with pytest.raises(ValueError, match=f"of program '{name}' could make"):
                served(llm, [(plain[0][0], beyond)])
    assert served(llm, plain) == before


def test_beam_search_takes_the_default_program(path, steering, engines):
    """It has no extra arguments of its own, so no program can be lost on the way."""
    add_tokenizer(path)
    params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts(3)]

    def beams(default):
        llm = engines(path, steering(programs=PROGRAMS, default=default), skip_tokenizer_init=False)
        return [b.tokens for output in llm.beam_search(asked, params) for b in output.sequences]

    with pytest.raises(TypeError):
        BeamSearchParams(beam_width=2, max_tokens=6, extra_args={"steer": "ablate"})
    assert beams("ablate") != beams(None)


def test_several_samples_are_steered_alike(path, steering, engines):
    llm = engines(path, steering(programs=PROGRAMS))
    prompt = prompts(1)[0]
    params = SamplingParams(
        n=3, top_k=1, max_tokens=8, detokenize=False, ignore_eos=True, seed=1,
        extra_args={"steer": "ablate"},
    )  # fmt: skip
    (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    wanted = served(llm, [(prompt, "ablate")], 8)[0]
    assert [list(one.token_ids) for one in output.outputs] == [wanted] * 3
    assert wanted != served(llm, [(prompt, None)], 8)[0]


def test_programs_that_do_not_fit_are_refused_before_the_weights_are_loaded(
    path, directions, steering, engines, monkeypatch, tmp_path
):
    import refusal_kernels as rk

    rk.Direction(torch.ones(9)).save(tmp_path / "long.safetensors")
    settings = steering(programs={"p": {"ablate": "long"}})
    settings["refusal_kernels"]["directions"] = {"long": str(tmp_path / "long.safetensors")}
    monkeypatch.setattr("vllm.v1.worker.worker_base.WorkerBase.__init__", None)
    with pytest.raises(rk.InputError, match="'p': ablate 'long': the direction has hidden size 9"):
        engines(path, settings)
    with pytest.raises(rk.InputError, match="'p' can make the residual stream overflow"):
        engines(path, steering(programs={"p": {"ablate": "r", "strength": 6}}))
