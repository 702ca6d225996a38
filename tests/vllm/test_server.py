"""The OpenAI-compatible server: steering per request, bad requests, cancellations, changes."""

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch
from families import add_tokenizer, make
from prometheus_client.parser import text_string_to_metric_families
from reference import greedy, hugging_face, prompts
from transformers import AutoTokenizer

import refusal_kernels as rk
from refusal_kernels.vllm.counters import CHANGES, REFUSED, REQUESTS
from refusal_kernels.vllm.metrics import NAME

TOKENS = 12
PROGRAMS, RELOAD = "/v1/refusal_kernels/programs", "/v1/refusal_kernels/reload"


@pytest.fixture(scope="module")
def path(folder):
    made = make("llama", folder)
    add_tokenizer(made)
    return made


FILE = """
[directions]
r = "r.safetensors"
t = "t.safetensors"
[programs]
r = {ablate = "r"}
[monitor]
direction = "r"
block_input = 2
"""


@pytest.fixture(scope="module")
def server(path, directions, folder):
    """A client of a server, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "settings.toml").write_text(FILE)
    command = [sys.executable, "-m", "refusal_kernels", "serve", path]
    command += ["--programs", str(folder / "settings.toml"), "--program", "t=ablate:t"]
    for name, value in {
        **{"served-model-name": "tiny", "host": "127.0.0.1", "port": port, "api-key": "secret"},
        **{"max-model-len": 128, "max-num-seqs": 8, "max-num-batched-tokens": 128},
        **{"gpu-memory-utilization": 0.3, "kv-cache-memory-bytes": 64 << 20, "dtype": "float32"},
    }.items():
        command += [f"--{name}", str(value)]
    command += ["--enforce-eager"]
    log = open(folder / "server.log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    key = {"Authorization": "Bearer secret"}
    try:
        with httpx.Client(base_url=url, headers=key, timeout=300) as client:
            for _ in range(600):
                assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield client, process
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def test_a_server_that_can_not_steer_ends_with_one_line(path, folder):
    """Before it loads the weights."""
    rk.Direction(torch.ones(9)).save(folder / "long.safetensors")
    program = f"p=ablate:{folder / 'long.safetensors'}"
    command = [sys.executable, "-m", "refusal_kernels", "serve", path, "--program", program]
    command += ["--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode
    words = "program 'p': ablate 'long': the direction has hidden size 9; the model has 64"
    assert done.stderr.splitlines()[-1] == f"refusal_kernels: {words}"
    assert "Traceback" not in done.stderr and "Loading safetensors" not in done.stderr


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
    client, _ = server
    for (k, name, strength), text in wanted.items():
        xargs = {"steer": name, "steer_strength": strength}
        answer = client.post("/v1/completions", json=body(prompts(8, seed=21)[k], xargs))
        assert tokens_of(answer) == text
    answer = client.post("/v1/completions", json=body(prompts(8, seed=21)[0]))
    assert tokens_of(answer) == wanted[0, "none", 1.0]


def test_a_stream_has_the_tokens_of_the_same_request_without(server, wanted):
    client, _ = server
    for (k, name, strength), text in list(wanted.items())[:4]:
        xargs = {"steer": name, "steer_strength": strength}
        request = {**body(prompts(8, seed=21)[k], xargs), "stream": True}
        tokens = []
        with client.stream("POST", "/v1/completions", json=request) as stream:
            for line in stream.iter_lines():
                data = line.removeprefix("data: ")
                if data not in ("", "[DONE]"):
                    tokens += json.loads(data)["choices"][0]["token_ids"]
        assert tokens == text


def test_bad_requests_get_400(server):
    client, _ = server
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
            answer = client.post("/v1/completions", json=request)
            assert answer.status_code == 400, answer.text
            assert words in answer.json()["error"]["message"]


def test_requests_that_vllm_would_serve_unsteered_get_400(server):
    client, _ = server
    for others, words in (
        ({"steer": "r"}, "'steer' outside 'vllm_xargs'"),
        ({"steering": "r"}, "has 'steering'"),
        ({"extra_body": {"steer": "r"}}, "'steer' in 'extra_body'"),
        ({"use_beam_search": True, "vllm_xargs": {"steer": "r"}}, "a beam search takes no"),
    ):
        request = {**body([5, 6, 7]), **others}
        answer = client.post("/v1/completions", json=request)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]


def test_programs_change_over_http(server):
    client, _ = server
    there = client.get(PROGRAMS).json()
    assert set(there["programs"]) == {"r", "t"} and there["directions"] == ["r", "t"]
    vector = [1.0, 0.0] * 32
    change = {"programs": {"n": {"set": "n", "value": 2.0}}, "directions": {"n": vector}}
    assert "n" in client.post(PROGRAMS, json=change).json()["programs"]
    answer = client.post("/v1/completions", json=body([5, 6, 7], {"steer": "n"}))
    assert len(tokens_of(answer)) == TOKENS
    assert client.post(PROGRAMS, json={"programs": {"n": None}}).status_code == 200
    for text, words in (
        ("{", "not JSON"),
        ('{"programs": []}', "must be objects"),
        ('{"programs": {"n": {"ablate": "nowhere"}}}', "no direction"),
        ('{"programs": {"none": {"ablate": "r"}}}', "cannot be the name"),
        ('{"directions": {"v": [1, "x"]}}', "list of numbers"),
        ('{"directions": {"v": [0, 0]}}', "zero"),
        ('{"other": 1}', "an object with programs"),
        ('{"directions": {"v": [NaN]}}', "not JSON"),
        ('{"directions": {"v": [1e39]}}', "finite"),
        ('{"directions": {"v": [1]}, "programs": {"n": {"ablate": "v"}}}', "hidden size 1; the"),
        ('{"programs": {"n": {"ablate": "r", "strength": 6}}}', "'n' can make the residual stream"),
        ('{"programs": {"n": {"ablate": "r", "layers": [9]}}}', "no place of the model"),
        ('{"programs": {"n": [{"ablate": "r"}, {"ablate": "t"}]}}', "'n' takes 2 slots"),
    ):
        answer = client.post(PROGRAMS, content=text)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    assert client.get(PROGRAMS).json()["programs"] == there["programs"]


def test_a_wrong_key_gets_401(server):
    client, _ = server
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        for path in ("/v1/completions", PROGRAMS, RELOAD):
            assert client.post(path, json={}, headers=headers).status_code == 401
        assert client.get(PROGRAMS, headers=headers).status_code == 401


def test_any_openai_client_chooses_a_program(server, path, directions):
    """By the name of a model, in chats and completions; docs/serving.md shows it."""
    client, _ = server
    page = (Path(rk.__file__).parents[1] / "docs" / "serving.md").read_text()
    (example,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "OpenAI(" in b]
    url = str(client.base_url).rstrip("/")
    for there, here in (
        ("http://localhost:8000", url),
        ("Qwen/Qwen2.5-7B-Instruct", "tiny"),
        ("ablate-refusal", "r"),
    ):
        assert there in example
        example = example.replace(there, here)
    exec(example, {})
    api = openai.OpenAI(base_url=f"{url}/v1", api_key="secret")
    assert [model.id for model in api.models.list()] == ["tiny", "tiny:r", "tiny:t"]
    messages = [{"role": "user", "content": "How do I bake bread?"}]
    prompt = AutoTokenizer.from_pretrained(path).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    exact = {"ignore_eos": True, "return_token_ids": True}
    model, answers = hugging_face(path), []
    for name, edits in (("tiny", ()), ("tiny:r", (rk.Ablate(directions["r"]),))):
        wanted = greedy(model, prompt, 8, edits)
        common = {"model": name, "max_tokens": 8, "temperature": 0, "extra_body": exact}
        chat = api.chat.completions.create(messages=messages, **common)
        assert chat.choices[0].token_ids == wanted
        completion = api.completions.create(prompt=prompt, **common)
        assert completion.choices[0].token_ids == wanted
        answers.append(wanted)
    half = {"vllm_xargs": {"steer_strength": 0.5}, **exact}
    chat = api.chat.completions.create(messages=messages, **{**common, "extra_body": half})
    edits = (rk.Ablate(directions["r"], 0.5),)
    answers.append(chat.choices[0].token_ids)
    assert answers[-1] == greedy(model, prompt, 8, edits) and len(set(map(str, answers))) == 3
    for name, error in (("tiny:x", openai.BadRequestError), ("other:r", openai.NotFoundError)):
        with pytest.raises(error):
            api.completions.create(prompt=prompt, model=name)


QUESTION = [{"role": "user", "content": "How do I bake bread?"}]
ENDPOINTS = {
    "/v1/chat/completions": {"messages": QUESTION, "max_tokens": 8},
    "/v1/chat/completions/batch": {"messages": [QUESTION], "max_tokens": 8},
    "/v1/messages": {"messages": QUESTION, "max_tokens": 8},
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 8},
}


def texts_in(value):
    """Give the answers in a response of any endpoint."""
    if isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("text", "content") and isinstance(item, str):
                yield item
            else:
                yield from texts_in(item)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_of_texts_is_steered(endpoint, server):
    client, _ = server

    def asked(**others):
        request = {"model": "tiny", "temperature": 0, **ENDPOINTS[endpoint], **others}
        return client.post(endpoint, json=request)

    def said(**others):
        answer = asked(**others)
        assert answer.status_code == 200, answer.text
        (text,) = texts_in(answer.json())
        return text

    steered = said(vllm_xargs={"steer": "r"})
    assert steered == said(model="tiny:r") != said()
    for stream in (False, True) if "batch" not in endpoint else (False,):
        answer = asked(vllm_xargs={"steer": "x"}, stream=stream)
        assert answer.status_code == 400 and "no program 'x'" in answer.text


def test_programs_are_reloaded_from_their_file(server, folder):
    client, process = server
    file, log = folder / "settings.toml", folder / "server.log"

    def programs():
        return client.get(PROGRAMS).json()["programs"]

    def wait_for(what):
        for _ in range(100):
            if what():
                return True
            time.sleep(0.1)

    before = programs()
    try:
        file.write_text(FILE + '\n[[programs.more]]\nablate = "r"\nstrength = 0.5\n')
        process.send_signal(signal.SIGHUP)
        assert wait_for(lambda: "more" in programs())
        tokens_of(client.post("/v1/completions", json=body([5, 6, 7], {"steer": "more"})))
        for text, words in (
            (FILE + "[", "is not TOML"),
            (FILE + '[programs.bad]\nablate = "x"\n', "program 'bad': there is no direction 'x'"),
            (FILE.replace("block_input = 2", "block_input = 1"), "monitor cannot change"),
        ):
            file.write_text(text)
            answer = client.post(RELOAD)
            assert answer.status_code == 400 and words in answer.json()["error"]["message"]
            process.send_signal(signal.SIGHUP)
            assert wait_for(lambda w=words: w in log.read_text())
            assert "more" in programs()
    finally:
        file.write_text(FILE)
        assert client.post(RELOAD).json()["programs"] == before


def test_requests_and_changes_are_counted(server):
    client, _ = server

    def counts():
        text = client.get("/metrics").text
        return {
            (sample.name.removesuffix("_total"), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("refusal_kernels:") and sample.name.endswith("_total")
        }

    before = counts()
    for steer in ("t", "none", "t", "nowhere"):
        client.post("/v1/completions", json=body([5, 6, 7], {"steer": steer}))
    client.post(PROGRAMS, json={"programs": {"t": {"ablate": "t"}}})
    client.post(PROGRAMS, json={"programs": {"t": {"ablate": "x"}}})
    new = {key: value - before.get(key, 0) for key, value in counts().items()}
    assert {key: value for key, value in new.items() if value} == {
        (REQUESTS, "t"): 2, (REQUESTS, "none"): 1, (REFUSED,): 1,
        (CHANGES, "made"): 1, (CHANGES, "refused"): 1,
    }  # fmt: skip


def counted(client):
    """What the server's own metrics say: tokens that it read, and tokens in the histogram."""
    text = client.get("/metrics").text
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    cached = values["vllm:prefix_cache_hits_total"]
    read = values["vllm:prompt_tokens_total"] - cached + values["vllm:generation_tokens_total"]
    return read, values[f"{NAME}_count"], values["vllm:request_success_total"]


def test_the_monitor_is_among_the_metrics_of_the_server(server):
    client, _ = server
    before = counted(client)
    for k, prompt in enumerate(prompts(3, seed=77)):
        xargs = {"steer": ("r", "none", "t")[k]}
        tokens_of(client.post("/v1/completions", json=body(prompt, xargs)))
    read, seen, requests = (b - a for a, b in zip(before, counted(client), strict=True))
    assert requests == 3
    assert seen == read - requests  # of each request the last token is never read


def memory_of(process):
    """Resident bytes of a process and its children."""
    folder = Path(f"/proc/{process}")
    pages = int((folder / "statm").read_text().split()[1])
    children = (folder / f"task/{process}/children").read_text().split()
    return pages * 4096 + sum(memory_of(int(child)) for child in children)


@pytest.mark.parametrize("requests", [100, pytest.param(4000, marks=pytest.mark.soak)])
def test_soak(requests, server, wanted):
    """Random programs, cancellations and changes: no wrong stream, no crash, no leak."""
    client, process = server
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
        there = {"base_url": client.base_url, "headers": client.headers, "timeout": 300}
        async with httpx.AsyncClient(**there) as many:
            await asyncio.gather(*(one(many, gate, number) for number in range(requests)))

    asyncio.run(all_of_them())
    assert not mistakes
    assert process.poll() is None
    if requests >= 4000:  # half of them to warm up: it takes more than a thousand
        # flat: the second half grows by less than a hundredth
        assert memory[-1] < 1.01 * memory[len(memory) // 2], [m >> 20 for m in memory]
