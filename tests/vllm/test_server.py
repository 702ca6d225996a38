"""The OpenAI-compatible server: steering per request, bad requests, cancellations, changes."""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from families import make
from prometheus_client.parser import text_string_to_metric_families
from reference import greedy, hugging_face, prompts

import refusal_kernels as rk
from refusal_kernels.vllm.metrics import NAME

TOKENS = 12
PROGRAMS = "/v1/refusal_kernels/programs"


@pytest.fixture(scope="module")
def path(folder):
    return make("llama", folder)


@pytest.fixture(scope="module")
def server(path, steering, folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = steering(
        programs={"r": {"ablate": "r"}, "t": {"ablate": "t"}},
        monitor={"direction": "r", "block_input": 2},
    )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in {
        **{"model": path, "served-model-name": "tiny", "host": "127.0.0.1", "port": port},
        **{"max-model-len": 128, "max-num-seqs": 8, "max-num-batched-tokens": 128},
        **{"gpu-memory-utilization": 0.3, "kv-cache-memory-bytes": 64 << 20, "dtype": "float32"},
        "additional-config": json.dumps(settings),
    }.items():
        command += [f"--{name}", str(value)]
    command += ["--enforce-eager", "--skip-tokenizer-init"]
    environment = {**os.environ, "VLLM_PLUGINS": "refusal_kernels,interpreted_triton"}
    log = open(folder / "server.log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def body(prompt, xargs=None):
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "min_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "detokenize": False,
        **({} if xargs is None else {"vllm_xargs": xargs}),
    }


def tokens_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def wanted(path, directions):
    model = hugging_face(path)
    texts = {}
    for k, prompt in enumerate(prompts(8, seed=21)):
        for name, strength in (("r", 1.0), ("t", 1.0), ("r", 0.5), ("none", 1.0)):
            edits = (rk.Ablate(directions[name], strength),) if name != "none" else ()
            texts[k, name, strength] = greedy(model, prompt, TOKENS, edits)
    return texts


def test_requests_name_their_program(server, wanted):
    url, _ = server
    for (k, name, strength), text in wanted.items():
        xargs = {"steer": name, "steer_strength": strength}
        answer = httpx.post(f"{url}/v1/completions", json=body(prompts(8, seed=21)[k], xargs))
        assert tokens_of(answer) == text
    answer = httpx.post(f"{url}/v1/completions", json=body(prompts(8, seed=21)[0]))
    assert tokens_of(answer) == wanted[0, "none", 1.0]


def test_bad_requests_get_400(server):
    url, _ = server
    for xargs, words in (
        ({"steer": "x"}, "no program 'x'"),
        ({"steer": 3}, "no program 3"),
        ({"steer": "r", "steer_strength": "much"}, "finite number"),
        ({"steer": ["r"]}, "no program"),
        ({"steer": "r", "steer_strength": 6}, "strength 6 of program 'r' could make"),
        ({"steer": "r", "steer_strength": -1}, "strength -1 of program 'r' could make"),
        ({"steer_strength": 1}, "and no program"),
        ({"steering": "r"}, "has 'steering'; expected 'steer'"),
        ({"steer": "r", "steer_strenght": 1}, "expected 'steer_strength'"),
        ({"steer": "r", "strength": 1}, "expected 'steer_strength'"),
    ):
        for stream in (False, True):
            request = {**body([5, 6, 7], xargs), "stream": stream}
            answer = httpx.post(f"{url}/v1/completions", json=request)
            assert answer.status_code == 400, answer.text
            assert words in answer.json()["error"]["message"]


def test_requests_that_vllm_would_serve_unsteered_get_400(server):
    url, _ = server
    for others, words in (
        ({"steer": "r"}, "'steer' outside 'vllm_xargs'"),
        ({"steering": "r"}, "has 'steering'"),
        ({"extra_body": {"steer": "r"}}, "'steer' in 'extra_body'"),
        ({"use_beam_search": True, "vllm_xargs": {"steer": "r"}}, "a beam search takes no"),
    ):
        request = {**body([5, 6, 7]), **others}
        answer = httpx.post(f"{url}/v1/completions", json=request)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]


def test_programs_change_over_http(server):
    url, _ = server
    there = httpx.get(url + PROGRAMS).json()
    assert set(there["programs"]) == {"r", "t"} and there["directions"] == ["r", "t"]
    vector = [1.0, 0.0] * 32
    change = {"programs": {"n": {"set": "n", "value": 2.0}}, "directions": {"n": vector}}
    assert "n" in httpx.post(url + PROGRAMS, json=change).json()["programs"]
    answer = httpx.post(f"{url}/v1/completions", json=body([5, 6, 7], {"steer": "n"}))
    assert len(tokens_of(answer)) == TOKENS
    assert httpx.post(url + PROGRAMS, json={"programs": {"n": None}}).status_code == 200
    for text, words in (
        ("{", "not JSON"),
        ('{"programs": []}', "must be objects"),
        ('{"programs": {"n": {"ablate": "nowhere"}}}', "no direction"),
        ('{"programs": {"none": {"ablate": "r"}}}', "can not be the name"),
        ('{"directions": {"v": [1, "x"]}}', "list of numbers"),
        ('{"directions": {"v": [0, 0]}}', "zero"),
        ('{"other": 1}', "an object with programs"),
    ):
        answer = httpx.post(url + PROGRAMS, content=text)
        assert answer.status_code == 400 and words in answer.text


def counted(url):
    """What the server's own metrics say: tokens that it read, and tokens in the histogram."""
    text = httpx.get(f"{url}/metrics").text
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    cached = values["vllm:prefix_cache_hits_total"]
    read = values["vllm:prompt_tokens_total"] - cached + values["vllm:generation_tokens_total"]
    return read, values[f"{NAME}_count"], values["vllm:request_success_total"]


def test_the_monitor_is_among_the_metrics_of_the_server(server):
    url, _ = server
    before = counted(url)
    for k, prompt in enumerate(prompts(3, seed=77)):
        xargs = {"steer": ("r", "none", "t")[k]}
        tokens_of(httpx.post(f"{url}/v1/completions", json=body(prompt, xargs)))
    read, seen, requests = (b - a for a, b in zip(before, counted(url), strict=True))
    assert requests == 3
    assert seen == read - requests  # of each request the last token is never read


def memory_of(process):
    """Resident bytes of a process and its children."""
    folder = Path(f"/proc/{process}")
    pages = int((folder / "statm").read_text().split()[1])
    children = (folder / f"task/{process}/children").read_text().split()
    return pages * 4096 + sum(memory_of(int(child)) for child in children)


@pytest.mark.parametrize("requests", [200, pytest.param(4000, marks=pytest.mark.soak)])
def test_soak(requests, server, wanted):
    """Random programs, cancellations and changes: no wrong stream, no crash, no leak."""
    url, process = server
    generator, mistakes, memory = random.Random(0), [], []
    all_prompts, cases = prompts(8, seed=21), list(wanted)

    async def one(client, gate, number):
        k, name, strength = generator.choice(cases)
        kind = generator.random()
        xargs = {"steer": name, "steer_strength": strength}
        async with gate:
            if number % (requests // 10) == 0:
                memory.append(memory_of(process.pid))
            if kind < 0.05:
                answer = await client.post("/v1/completions", json=body([5], {"steer": "x"}))
                if answer.status_code != 400:
                    mistakes.append(("bad name", answer.text))
            elif kind < 0.10:
                vector = [generator.gauss(0, 1) for _ in range(64)]
                change = {"programs": {"n": {"ablate": "n"}}, "directions": {"n": vector}}
                answer = await client.post(PROGRAMS, json=change)
                if answer.status_code != 200:
                    mistakes.append(("change", answer.text))
            elif kind < 0.25:  # canceled after its first tokens
                request = {**body(all_prompts[k], xargs), "stream": True}
                async with client.stream("POST", "/v1/completions", json=request) as stream:
                    async for _ in stream.aiter_lines():
                        break
            else:
                answer = await client.post("/v1/completions", json=body(all_prompts[k], xargs))
                if tokens_of(answer) != wanted[k, name, strength]:
                    mistakes.append((k, name, strength, answer.text))

    async def all_of_them():
        gate = asyncio.Semaphore(12)
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            await asyncio.gather(*(one(client, gate, number) for number in range(requests)))

    asyncio.run(all_of_them())
    assert not mistakes
    assert process.poll() is None
    if requests >= 4000:  # half of them to warm up: it takes more than a thousand
        # flat: the second half grows by less than a hundredth
        assert memory[-1] < 1.01 * memory[len(memory) // 2], [m >> 20 for m in memory]
