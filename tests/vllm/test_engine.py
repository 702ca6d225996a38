"""One engine, many requests: mixtures, caches, chunks, preemption, bad requests, other engines."""

import json

import numpy as np
import pytest
import torch
from families import make
from reference import TOKENS, greedy, hugging_face, interventions, prompts, served
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import SamplingParams

import refusal_kernels as rk
from refusal_kernels import InputError
from refusal_kernels.hf import embedded
from refusal_kernels.vllm.check import filled, lent
from refusal_kernels.vllm.names import RESOLVED

EIGHT = {
    "ablate": {"ablate": "r"},
    "half": {"ablate": "r", "strength": 0.5},
    "other": {"ablate": "t"},
    "add": {"add": "r", "coefficient": 2.0, "block_input": 2},
    "away": {"add": "t", "coefficient": -3.0, "layers": [0, 1]},
    "clamp": {"clamp": "r", "high": 0.0},
    "set": {"set": "t", "value": 2.0},
    "two": [{"ablate": "r"}, {"ablate": "t", "sites": ["attn", "mlp"]}],
}


@pytest.fixture(scope="module")
def path(folder):
    return make("llama", folder)


def different(texts):
    return len({tuple(text) for text in texts})


def test_a_mixed_batch_says_what_each_request_says_alone(path, steering, engines):
    llm = engines(
        path,
        steering(programs=EIGHT),
        enable_prefix_caching=False,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
    )
    names = [*EIGHT, "none"]
    kinds = ("all", "prompt", "generated", "last")
    asked = [
        (
            prompt,
            {
                "program": names[k % len(names)],
                "strength": 1.0 - 0.3 * (k % 2),
                "positions": kinds[k // len(names) % len(kinds)],
            },
        )
        for k, prompt in enumerate(prompts(64))
    ]
    together = served(llm, asked, 4)
    alone = [served(llm, [one], 4)[0] for one in asked]
    assert together == alone
    same = [(prompts(1)[0], {"program": name}) for name in names]
    assert different(served(llm, same)) == len(names)


@pytest.mark.full
def test_real_weights_serve_programs_mixed_in_a_batch(folder, engines):
    """SmolLM2-135M-Instruct, token by token as the patched Hugging Face model."""
    try:
        real = str(embedded.smollm2_folder())
    except InputError as error:
        pytest.skip(str(error))
    model = hugging_face(real)
    q, _ = torch.linalg.qr(torch.randn(576, 2, generator=torch.Generator().manual_seed(1)))
    directions = {"r": rk.Direction(q[:, 0] * 30), "t": rk.Direction(q[:, 1] * 30)}
    files = {name: str(folder / f"{name}-576.safetensors") for name in directions}
    for name, direction in directions.items():
        direction.save(files[name])
    llm = engines(real, {"refusal_kernels": {"directions": files, "programs": EIGHT}})
    programs = {**EIGHT, "none": []}
    asked = [(prompt, name) for prompt in prompts(2) for name in programs]
    texts = [
        greedy(model, prompt, 8, interventions(programs[name], directions))
        for prompt, name in asked
    ]
    assert served(llm, asked, 8) == texts
    assert different(texts) > len(programs)


@pytest.mark.parametrize(
    ("dtype", "fused"),
    [("float32", True), pytest.param("bfloat16", False, marks=pytest.mark.full)],
)
def test_requests_without_steering_say_what_an_engine_without_the_plugin_says(
    dtype, fused, path, steering, engines
):
    asked = [(prompt, None) for prompt in prompts(8)]
    without = served(engines(path, None, dtype=dtype), asked, 12)
    llm = engines(path, steering(programs=EIGHT, fuse_norms=fused), dtype=dtype)
    assert served(llm, asked, 12) == without
    beside = [(prompt, {"program": "ablate"}) for prompt in prompts(8, seed=9)]
    mixed = served(llm, [pair for both in zip(asked, beside, strict=True) for pair in both], 12)
    assert mixed[::2] == without


def test_an_engine_that_does_not_ask_is_untouched(path, engines):
    from vllm.model_executor.layers.layernorm import RMSNorm

    runner = engines(path, None).llm_engine.model_executor.driver_worker.worker.model_runner
    kinds = {type(m) for m in runner.model.modules() if isinstance(m, RMSNorm)}
    assert kinds == {RMSNorm}
    assert not hasattr(runner, "refusal_kernels_state")
    assert not [name for name, _ in runner.model.named_buffers() if "rk_" in name]


def test_the_route_follows_every_change_of_a_batch(path, steering, engines):
    llm = engines(path, steering(programs={"r": {"ablate": "r"}, "t": {"ablate": "t"}}))
    state = llm.llm_engine.model_executor.driver_worker.worker.model_runner.refusal_kernels_state
    r, t = state.bank.versions

    def routed(asked, counts):
        for name, params in asked.items():
            if name not in state.router.steering:
                state.learn(name, params)
        counts = np.array(counts, dtype=np.int32)
        state.route(list(asked), counts, 0 * counts, torch.zeros(16))
        route = state.bank.route[: sum(counts) + 1].tolist()
        assert route.pop() == -1
        rows = {row: version for (version, _), row in state.bank._row_of.items()}
        return [rows.get(row) for row in route]

    def params(version):
        extra = {} if version is None else {RESOLVED: [version, 1.0]}
        return SamplingParams(extra_args=extra)

    asked = {"a": params(r), "b": params(None), "c": params(t)}
    assert routed(asked, [2, 1, 1]) == [r, r, None, t]
    assert routed(asked, [1, 1, 1]) == [r, None, t]
    assert routed(asked, [1, 1, 1]) == [r, None, t]
    assert routed({"c": params(t), "a": params(r)}, [1, 1]) == [t, r]
    state.forget(["a"])  # and the name comes again
    assert routed({"c": params(t), "a": params(None)}, [1, 1]) == [t, None]
    with lent(state.bank):
        state.bank.route.fill_(5)
    assert routed({"c": params(t), "a": params(None)}, [1, 1]) == [t, None]


@pytest.mark.parametrize("guarded", [True, False])
def test_a_cached_prefix_is_not_served_to_another_program(
    guarded, path, directions, steering, engines, monkeypatch
):
    if not guarded:  # what happens then: this test would notice
        monkeypatch.setattr("refusal_kernels.vllm.frontend.cache_salt", lambda salt, _: salt)
    model, prompt = hugging_face(path), prompts(1, longest=90)[0] * 8
    prompt = prompt[:96]
    wanted = [
        greedy(model, prompt, TOKENS, *case)
        for case in (
            ((rk.Ablate(directions["r"]),), 1.0),
            ((rk.Ablate(directions["r"]),), 0.5),
            ((rk.Ablate(directions["t"]),), 1.0),
            ((), 1.0),
        )
    ]
    llm = engines(path, steering(programs=EIGHT), enable_prefix_caching=True, block_size=32)
    steers = [
        {"program": "ablate"},
        {"program": "ablate", "strength": 0.5},
        {"program": "other"},
        None,
    ]
    got = [served(llm, [(prompt, steer)])[0] for steer in steers]
    assert got[0] == wanted[0]
    assert (got == wanted) is guarded
    if guarded:  # and is served to the same one
        hits = [
            llm.generate(
                {"prompt_token_ids": prompt},
                SamplingParams(max_tokens=1, detokenize=False, extra_args={"steer": steer}),
                use_tqdm=False,
            )[0].num_cached_tokens
            for steer in (*steers, {"program": "half"})
        ]
        assert all(hits[:4]) and hits[4] == 0


@pytest.fixture
def asynchronous(request, monkeypatch):
    """Let vLLM schedule a batch before the last one has ended, which it does on a GPU alone."""
    if not request.param:
        return
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def forced(_, vllm_config):
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(forced))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waits", "async"], indirect=True)
def test_chunked_prefill_and_preemption(asynchronous, path, directions, steering, engines, request):
    model = hugging_face(path)
    asked, wanted = [], []
    for k, prompt in enumerate(prompts(6, seed=11, longest=40)):
        prompt = (prompt * 20)[:70]
        name, cases = (
            ("ablate", (rk.Ablate(directions["r"]),)),
            ("none", ()),
            ("add", (rk.Add(directions["r"], 2.0, block_input=2),)),
        )[k % 3]
        asked.append((prompt, {"program": name}))
        wanted.append(greedy(model, prompt, 40, cases))
    llm = engines(
        path,
        steering(programs=EIGHT),
        max_num_batched_tokens=32,  # of a prompt of 70
        enable_chunked_prefill=True,
        max_num_seqs=8,
        block_size=32,
        num_gpu_blocks_override=12,  # 384 tokens; the six need 660
    )
    config = llm.llm_engine.vllm_config.scheduler_config
    assert config.async_scheduling == ("async" in request.node.callspec.id)
    assert served(llm, asked, 40) == wanted


def test_bad_requests_are_refused_and_hurt_nobody(path, steering, engines):
    llm = engines(path, steering(programs=EIGHT, default="ablate"))
    prompt = prompts(1)[0]
    before = served(llm, [(prompt, None)])
    for steer, words in (
        ({"program": "nowhere"}, "no program 'nowhere'"),
        ({"program": "ablate", "strength": "x"}, "finite number"),
        ({"programme": "ablate"}, "has 'programme'"),
        (["ablate"], "no program"),
    ):
        with pytest.raises(ValueError, match=words):
            served(llm, [(prompt, steer)])
    assert not llm.llm_engine.has_unfinished_requests()
    assert served(llm, [(prompt, None)]) == before
    assert served(llm, [(prompt, "ablate")]) == before
    assert served(llm, [(prompt, "none")]) != before


# --- the start-up check


def places_without(number):
    from refusal_kernels.vllm import families

    whole = families.find_places

    def find(model, architecture):
        places = whole(model, architecture)
        del places[number]
        return places

    return find


@pytest.mark.parametrize("number", [0, 3, -1])
def test_an_add_that_no_site_sees_is_noticed(number, path, steering, engines, monkeypatch):
    monkeypatch.setattr("refusal_kernels.vllm.worker.find_places", places_without(number))
    with pytest.raises(InputError, match="cannot be steered"):
        engines(path, steering(programs=EIGHT))


def test_another_write_to_the_stream_is_noticed(path, steering, engines, monkeypatch):
    from vllm.model_executor.models.llama import LlamaDecoderLayer

    unmodified = LlamaDecoderLayer.forward

    def forward(self, positions, hidden_states, residual):
        hidden_states, residual = unmodified(self, positions, hidden_states, residual)
        return hidden_states, residual * 1.01  # as a family might that scales its residual

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    monkeypatch.setattr("refusal_kernels.vllm.families._fused_norms", by_name)
    with pytest.raises(InputError, match=r"layers\.0\.mlp adds to another tensor"):
        engines(path, steering(programs=EIGHT))


def by_name(module):
    names = ("input_layernorm", "post_attention_layernorm", "norm")
    return [getattr(module, name) for name in names if hasattr(module, name)]


def test_families_are_lists_of_names(path, steering, engines, monkeypatch):
    monkeypatch.setattr("refusal_kernels.vllm.families.FUSED", frozenset())
    with pytest.raises(InputError, match="LlamaForCausalLM cannot be steered"):
        engines(path, steering(programs=EIGHT))
    monkeypatch.setattr("refusal_kernels.vllm.families.ADDING", frozenset({"LlamaForCausalLM"}))
    with pytest.raises(InputError, match=r"adds nothing to the stream|returns no sum"):
        engines(path, steering(programs=EIGHT))


class Fills(TorchDispatchMode):
    """Counts the tensors that are filled with a number."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten.fill_.Scalar
        return operation(*args, **(kwargs or {}))


def test_a_storage_that_layers_share_is_filled_once():
    shared, alone = torch.zeros(64), torch.zeros(8, dtype=torch.bfloat16)
    caches = [shared[:32].view(4, 8).T, shared[32:], shared, alone, None]
    with Fills() as fills, filled(caches):
        assert fills.count == 2
        assert (shared > 0).all() and (alone > 0).all()
    assert not shared.any() and not alone.any()


# --- the compile cache


def test_all_that_the_graph_depends_on_is_in_the_key_of_the_compile_cache(
    path, steering, engines, tmp_path, monkeypatch
):
    file = tmp_path / "settings.json"

    def key(**settings):
        """Of an engine whose configuration says nothing but the name of the file."""
        settings = steering(programs={"ablate": {"ablate": "r"}}, **settings)
        file.write_text(json.dumps(settings["refusal_kernels"]))
        llm = engines(path, {"refusal_kernels": {"file": str(file)}})
        return llm.llm_engine.vllm_config.compute_hash()

    monitor = {"direction": "r", "block_input": 1}
    keys = [key(), key(slots=3), key(fuse_norms=False), key(monitor=monitor)]
    monkeypatch.setattr("refusal_kernels.vllm.worker.__version__", "another")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_sites_ask_the_registry_for_their_ops(monkeypatch):
    from refusal_kernels.vllm.bank import Bank
    from refusal_kernels.vllm.families import START, EnginePlace
    from refusal_kernels.vllm.sites import SteeredAdd, SteeredAddNorm

    places = [EnginePlace("embed", START, torch.nn.Identity(), feeds=0)]
    bank = Bank(places, 8, rows=1, slots=1, tokens=4, device="cpu")
    x, weight = torch.randn(3, 8), torch.ones(8)
    assert torch.equal(SteeredAdd(bank, 0)(x, x), x + x)
    monkeypatch.setenv("REFUSAL_KERNELS_BACKEND", "nothing")
    for call in (
        lambda: SteeredAdd(bank, 0)(x, x),
        lambda: SteeredAddNorm(bank, 0)(x, x, weight, 1e-6, 0.0),
    ):
        with pytest.raises(InputError, match="no backend 'nothing'"):
            call()


@pytest.mark.parametrize("place", [pytest.param("embed", marks=pytest.mark.full), "layers.1.attn"])
def test_a_compiled_graph_that_does_not_steer_is_noticed(
    place, folder, steering, engines, monkeypatch
):
    from refusal_kernels.vllm import sites

    kind = sites.SteeredAdd if place == "embed" else sites.SteeredAddNorm
    unmodified = kind.forward

    def forward(self, *args):
        if not (torch.compiler.is_compiling() and self.left_out):
            return unmodified(self, *args)
        if place == "embed":
            return args[0].clone()
        route = torch.full_like(self.route[: args[0].shape[0]], -1)
        op = torch.ops.refusal_kernels.add_steer_rms_norm_inference
        return op(*args[:4], self.bank, self.params, route, args[4])

    monkeypatch.setattr(kind, "forward", forward)
    claim = sites.claim

    def claim_and_mark(places, bank, fuse_norms):
        made = claim(places, bank, fuse_norms)
        for site, at in zip(made, places, strict=True):
            site.left_out = at.name == place
        return made

    monkeypatch.setattr("refusal_kernels.vllm.worker.claim", claim_and_mark)
    path = make("llama", folder, num_hidden_layers=2)  # each layer is compiled
    programs = {"r": {"ablate": "r"}}
    with pytest.raises(InputError, match=f"compiled graph does not steer at {place}"):
        engines(path, steering(programs=programs), enforce_eager=False)


@pytest.mark.full  # tests/vllm/test_positions.py has drafts beside steering
def test_speculative_decoding_says_the_same(path, directions, steering, engines, monkeypatch):
    # the drafter loads numba, beside which vLLM starts no further engine in the same process
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model = hugging_face(path)
    asked = [((prompt * 6)[:48], name) for prompt in prompts(3) for name in ("ablate", "none")]
    wanted = [
        greedy(model, prompt, 24, (rk.Ablate(directions["r"]),) if name == "ablate" else ())
        for prompt, name in asked
    ]
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    llm = engines(path, steering(programs=EIGHT), speculative_config=drafts)
    assert served(llm, asked, 24) == wanted
