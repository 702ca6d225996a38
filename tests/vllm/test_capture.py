"""Captured graphs replay with another program, strength and route, without a new capture."""

import recorded
import torch
from families import make
from reference import compare, programs_for
from vllm import envs
from vllm.config import CUDAGraphMode

from refusal_kernels.vllm.requests import Steering

TOKENS = 8


def test_a_compiled_region_follows_what_is_written_between_replays(
    reference, steering, engines, monkeypatch, request
):
    envs.disable_envs_cache()  # before and after
    request.addfinalizer(envs.disable_envs_cache)
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "0")  # the recorded graph can't be saved
    path, texts = reference("llama")
    recorded.replays.clear()
    llm = engines(
        path,
        steering(programs=programs_for("llama")),
        enforce_eager=False,
        compilation_config={"mode": 2, "backend": "recorded.backend"},
        max_num_seqs=40,
    )
    compare(llm, texts)
    assert len(recorded.replays) > 5
    bank = (
        llm.llm_engine.model_executor.driver_worker.worker.model_runner.refusal_kernels_state.bank
    )
    written = {tensor.data_ptr() for tensor in (bank.vectors, bank.route, *bank.params)}
    assert written <= set().union(*(graph.addresses for graph in recorded.replays))


def test_a_whole_forward_follows_what_is_written_between_replays(
    folder, steering, engines, request
):
    llm = engines(
        make("llama", folder), steering(programs={"r": {"ablate": "r"}, "t": {"ablate": "t"}})
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model, router = runner.model, runner.refusal_kernels_state.router
    v2 = request.config.getoption("--runner") == "v2"
    forward, recorder, outputs = model.forward, recorded.Recorder(), []

    def capture(*args, **kwargs):
        with recorder:
            outputs.append(forward(*args, **kwargs))
        return outputs[-1]

    def replay(*args, **kwargs):
        recorder.replay()
        return outputs[0]

    def ran(how):
        model.forward = how
        mode = {"is_profile": True}
        if not v2:
            mode = {"cudagraph_runtime_mode": CUDAGraphMode.NONE, "force_attention": True}
        with torch.inference_mode():
            result, _ = runner._dummy_run(TOKENS, **mode)
        return result[:TOKENS].clone()

    def route(asked):
        for name, steering_ in asked.items():
            router.learn(name, steering_)
        counts = torch.ones(len(asked), dtype=torch.int32).numpy()
        router.route(list(asked), counts, 0 * counts, None)

    r, t = router.bank.versions
    rows = [Steering(r, 1.0), None, Steering(t, 1.0), Steering(r, 0.5), Steering(t, -1.0)]
    names = "abcdefgh"
    route(dict(zip(names, rows, strict=False)))
    captured = ran(capture)
    assert torch.equal(ran(replay), captured)
    rows = [None, Steering(t, 0.25), Steering(r, 1.0), None, Steering(t, 0.75), Steering(r, -0.5)]
    changed = dict(zip(names, rows, strict=False))  # fewer than the captured tokens: the rest pads
    route(changed)
    replayed, expected = ran(replay), ran(forward)
    assert torch.equal(replayed, expected)
    assert not torch.equal(replayed, captured)
    route({"a": None})
    assert torch.equal(ran(replay)[len(rows) :], expected[len(rows) :])  # padding is unsteered
