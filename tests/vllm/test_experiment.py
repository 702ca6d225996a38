"""The experiment on the engine says what it says on a Hugging Face model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config

import refusal_kernels as rk
from refusal_kernels import InputError, toy
from refusal_kernels.hf import embedded

GOLDEN = Path(__file__).parents[1] / "research" / "golden"
POSITIONS = 3
CPU = {
    "max_num_seqs": 32,
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
}


@pytest.fixture(scope="module")
def loaded():
    # without it vLLM replaces parts of classes that one of its engines has served
    with set_current_vllm_config(VllmConfig()):
        return rk.load("toy", "cpu")


@pytest.fixture(scope="module")
def prompts():
    return {name: toy.prompts(name, "train")[:24] for name in ("harmful", "harmless")}


@pytest.fixture(scope="module")
def candidates(loaded, prompts):
    return rk.mean_difference(*loaded, *prompts.values())


@pytest.fixture(scope="module")
def direction(candidates):
    return candidates.at(5, -1)


@pytest.fixture(scope="module")
def start(folder):
    """Start engines by `rk.Engine`, one at a time; one that is asked for again is still there."""
    made = []

    def close():
        while made:
            made.pop()[0].close()

    def started(**options):
        if not made or made[0][1] != options:
            close()
            made.append((rk.Engine("toy", **{**CPU, "positions": POSITIONS, **options}), options))
        return made[0][0]

    started.close = close
    yield started
    close()


@pytest.fixture
def engine(start):
    return start()


@pytest.fixture
def alone(start):
    """Close the engine that is there: the test starts its own."""
    start.close()


def apart(found, expected):
    """Return the largest distance of two candidates, in norms of the second; layer 0 is zero."""
    distance = (found.vectors - expected.vectors).double().norm(dim=-1)
    return float((distance / expected.vectors.double().norm(dim=-1))[:, 1:].max())


# --- rk.Engine


def test_the_package_does_not_load_vllm():
    code = "import sys, refusal_kernels as rk; rk.Engine; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_request_has_its_own_edit(engine, loaded, prompts, direction):
    edits = [None, rk.Ablate(direction), rk.Ablate(direction, 0.5), rk.Add(direction)]
    asked = [(prompt, edit) for prompt in prompts["harmful"][:4] for edit in edits]
    wanted = []
    for prompt, edit in asked:
        if edit is None:
            wanted += rk.generate(*loaded, [prompt])
        else:
            with rk.patch(loaded[0], edit):
                wanted += rk.generate(*loaded, [prompt])
    assert engine.generate(*map(list, zip(*asked, strict=True))) == wanted
    assert len(set(wanted)) > len(edits)


def test_programs_have_names(start, loaded, prompts, direction):
    other = rk.Direction(direction.vector.roll(1))
    other = rk.Direction(other.unit - (other.unit @ direction.unit) * direction.unit)
    engine = start(
        programs={"one": rk.Ablate(direction), "two": [rk.Ablate(direction), rk.Ablate(other)]}
    )
    asked = prompts["harmful"][:3]
    for name, edits in (
        ("one", [rk.Ablate(direction)]),
        ("two", [rk.Ablate(direction), rk.Ablate(other)]),
    ):
        with rk.patch(loaded[0], *edits):
            assert engine.generate(asked, name) == rk.generate(*loaded, asked)
    with pytest.raises(InputError, match="no program 'three'; there are: one, two"):
        engine.generate(asked, "three")
    with pytest.raises(InputError, match="2 edits for 3 prompts"):
        engine.generate(asked, ["one", None])
    with pytest.raises(InputError, match=r"a prompt has .* tokens .* the engine takes 128"):
        engine.generate(["storm " * 200])
    assert engine.generate(asked) == rk.generate(*loaded, asked)  # nothing is left of these


def test_programs_are_refused_before_the_model_is_loaded(alone, monkeypatch):
    def load_model(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vllm.v1.worker.cpu_worker.CPUWorker.load_model", load_model)
    with pytest.raises(InputError, match="the direction has hidden size 7; the model has"):
        rk.Engine("toy", {"p": rk.Ablate(rk.Direction(torch.randn(7)))}, **CPU)
    with pytest.raises(InputError, match="the model was loaded"):
        rk.Engine("toy", **CPU)


# --- extraction


def test_the_mean_differences_are_those_of_the_model(engine, candidates, prompts):
    found = rk.mean_difference(engine, engine.tokenizer, *prompts.values())
    assert found.template == candidates.template
    assert apart(found, candidates) < 1e-5
    fewer = rk.mean_difference(
        engine, engine.tokenizer, *prompts.values(), positions=2, last_layer=4
    )
    assert fewer.vectors.shape == (2, 5, 128)
    assert torch.equal(fewer.vectors, found.vectors[-2:, :5])
    with pytest.raises(InputError, match="the engine reads 3 positions, and 4 are asked for"):
        rk.mean_difference(engine, engine.tokenizer, *prompts.values(), positions=4)


@pytest.mark.parametrize("options", [
    {"max_num_batched_tokens": 8, "max_num_seqs": 8},  # prompts in several chunks
    pytest.param({"enforce_eager": False}, marks=pytest.mark.full),
], ids=["chunks", "compiled"])  # fmt: skip
def test_how_prompts_are_batched_changes_nothing(options, start, candidates, prompts):
    engine = start(**options)
    engine.generate(prompts["harmful"][:8])  # their prefixes are cached now
    found = rk.mean_difference(engine, engine.tokenizer, *prompts.values())
    assert apart(found, candidates) < 1e-5


def test_what_is_computed_again_is_read_once():
    """A preempted prompt comes again from its beginning."""
    from types import SimpleNamespace

    from refusal_kernels.vllm.names import MOMENTS, READ
    from refusal_kernels.vllm.reading import Reading

    bank = SimpleNamespace(
        route=torch.zeros(16),
        vectors=torch.zeros(1, 2, 1, 4),
        places=[SimpleNamespace(feeds=0, block=None)],
    )
    site = SimpleNamespace()
    reading = Reading(3, bank, [site], 2, reports=True)
    reading.mark("a", SimpleNamespace(extra_args={READ: [MOMENTS, 1, 10]}))
    h = torch.randn(12, 4)

    def run(first, end, others=2):
        """Tokens first to end of a request of 10 tokens, behind those of one that is not read."""
        reading.follow(["b", "a"], [others, end - first], [5, first])
        batch = torch.cat([torch.full((others, 4), torch.nan), h[first:end]])
        site.reader(batch)

    for first, end in ((0, 4), (4, 9), (0, 8), (8, 10)):
        run(first, end)
    assert site.reader.count.tolist() == [[0] * 3, [1] * 3]
    torch.testing.assert_close(site.reader.mean[1].float(), h[7:10])
    reading.forget("a")
    run(7, 10)
    assert int(site.reader.count.sum()) == 3


def test_an_interrupted_extraction_resumes(engine, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("refusal_kernels.research.extraction.served.PROMPTS", 10)
    file, given = tmp_path / "state", (engine, engine.tokenizer, *prompts.values())
    whole = rk.mean_difference(*given)

    def interrupted(done, total):
        if done > 34:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rk.mean_difference(*given, checkpoint=file, progress=interrupted)
    told = []
    resumed = rk.mean_difference(*given, checkpoint=file, progress=lambda *n: told.append(n))
    assert 30 < told[0][0] <= 40 and told[-1] == (sum(map(len, prompts.values())),) * 2
    assert apart(resumed, whole) < 1e-6
    with pytest.raises(InputError, match=r"of another run, with another .*set of prompts"):
        rk.mean_difference(*given[:2], given[2][1:], given[3], checkpoint=file)


@pytest.mark.full
@pytest.mark.parametrize(
    ("tensor", "pipeline", "eager"),
    [(2, 1, True), (1, 2, True), (2, 2, False)],
)
def test_ranks_hold_their_layers_and_whole_rows(
    tensor, pipeline, eager, start, candidates, prompts, monkeypatch
):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    engine = start(
        tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, enforce_eager=eager
    )
    found = rk.mean_difference(engine, engine.tokenizer, *prompts.values())
    assert apart(found, candidates) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (3, 1), (1, 2)])
def test_real_weights_have_the_same_mean_differences(tensor, pipeline, alone, monkeypatch):
    """SmolLM2-135M-Instruct, whose nine heads three ranks can share; transformers in float64.

    In float32 transformers is as far from that as the engine: 8e-6 of a small difference's norm.
    """
    try:
        embedded.smollm2_folder()
    except InputError as error:
        pytest.skip(str(error))
    if tensor * pipeline > 1:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    prompts = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))
    with set_current_vllm_config(VllmConfig()):
        model, tokenizer = rk.load("smollm2", "cpu")
    expected = rk.mean_difference(model.double(), tokenizer, prompts["a"], prompts["b"])
    ranks = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    settings = {**CPU, "max_model_len": 512}
    with rk.Engine("smollm2", positions=6, **ranks, **settings) as engine:
        found = rk.mean_difference(engine, tokenizer, prompts["a"], prompts["b"])
    assert apart(found, expected) < 1e-5


# --- selection


@pytest.fixture(scope="module")
def validation():
    return [toy.prompts(name, "validation")[:4] for name in ("harmful", "harmless")]


def test_the_same_candidate_wins(engine, loaded, candidates, validation, tmp_path):
    expected = rk.select(*loaded, candidates, *validation)
    told, file = [], tmp_path / "state"
    selection = rk.select(
        engine, engine.tokenizer, candidates, *validation, checkpoint=file,
        progress=lambda *numbers: told.append(numbers),
    )  # fmt: skip
    assert selection.place == expected.place is not None and selection.passed
    assert selection.refusal_tokens == expected.refusal_tokens
    for found, row in zip(selection.candidates, expected.candidates, strict=True):
        assert (found.position, found.layer) == (row.position, row.layer)
        if row.kl is None:
            assert found == row
            continue
        assert found.bypass == pytest.approx(row.bypass, abs=1e-4)
        assert found.induce == pytest.approx(row.induce, abs=1e-4)
        assert found.kl == pytest.approx(row.kl, abs=1e-4)
    measured = sum(row.kl is not None for row in expected.candidates)
    assert told[-1] == (measured * (len(validation[0]) + 2 * len(validation[1])),) * 2
    again = rk.select(engine, engine.tokenizer, candidates, *validation, checkpoint=file)
    assert again.to_dict() == selection.to_dict()  # with nothing measured again


# --- evaluation


def test_the_evidence_is_the_same(engine, loaded, candidates, direction):
    given = {
        "harmful": toy.prompts("harmful", "test")[:3],
        "harmless": toy.prompts("harmless", "test")[:3],
        "extra": {"again": toy.prompts("harmless", "validation")[:2]},
        "judges": ["substrings", "tokens"],
        "candidates": candidates,
        "skills": {"capitals": next(iter(toy.skills().values()))[:3]},
        "strengths": (-1.0, 0.0, 1.5),
        "random_controls": 1,
        "layer_controls": 1,
        "max_new_tokens": 8,
    }
    expected = rk.evaluate(*loaded, direction, **given).to_dict()
    found = rk.evaluate(engine, engine.tokenizer, direction, **given).to_dict()
    assert set(found) == set(expected)
    # each of 17 places would double the component
    assert expected["dose"]["ablation"].pop(0)["strength"] == -1.0
    note = "strength -1 is not measured: program 'Ablate' can make the residual stream overflow"
    assert found.pop("notes")[0].startswith(note) and not expected.pop("notes")
    for name, condition in expected["conditions"].items():
        same(found["conditions"][name], condition, name)
    for key in ("dose", "projections", "prompts", "refusal_tokens", "judges"):
        same(found[key], expected[key], key)


def same(found, expected, where):
    """Compare numbers within rounding, and everything else."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            same(found[key], expected[key], f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for k, (a, b) in enumerate(zip(found, expected, strict=True)):
            same(a, b, f"{where}, {k}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=2e-4, rel=1e-4), where
    else:
        assert found == expected, where


# --- commands


@pytest.mark.parametrize("ranks", [
    [],
    pytest.param(["--tensor-parallel-size", "2"], marks=pytest.mark.full),
    pytest.param(["--pipeline-parallel-size", "2"], marks=pytest.mark.full),
], ids=["one", "tensor", "pipeline"])  # fmt: skip
def test_the_commands_take_the_engine(ranks, alone, tmp_path, monkeypatch):
    """Extract, select and evaluate one after the other, each with an engine of its own."""
    from refusal_kernels.cli import app

    if ranks:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    args = json.dumps(CPU)

    def run(command, *options):
        file = tmp_path / f"{command}.json"
        # by its folder: by its name all of its skills are asked
        served = ("--model", str(toy.PATH), "--engine", "vllm", "--engine-args", args, *ranks)
        app([command, *served, "--json", str(file), *map(str, options)], standalone_mode=False)
        document = json.loads(file.read_text())
        assert document["engine"]["name"] == "vllm"
        return document

    candidates, direction = tmp_path / "c.safetensors", tmp_path / "d.safetensors"

    def some(count, split):  # V2's interpreted kernels are slow
        for name in ("harmful", "harmless"):
            file = tmp_path / f"{name}.{split}.txt"
            file.write_text("\n".join(toy.prompts(name, split)[:count]))
            yield from (f"--{name}", file)

    run("extract", *some(12, "train"), "--split", "all", "--out", candidates)
    chosen = run(
        "select", *some(3, "validation"), "--split", "all",
        "--candidates", candidates, "--out", direction,
    )  # fmt: skip
    assert rk.Direction.load(direction).layer == chosen["layer"]
    evidence = run(
        "evaluate", *some(4, "test"), "--split", "all", "--direction", direction, "--strengths", "",
        "--random-controls", 0, "--max-new-tokens", 8,
    )  # fmt: skip
    rates = {name: c["rates"]["harmful"] for name, c in evidence["conditions"].items()}
    assert rates["unmodified"]["12 substrings"]["k"] == 4
    assert rates["ablated"]["12 substrings"]["k"] == 0


@pytest.mark.full
def test_the_protocol_says_the_same_on_the_engine(alone, tmp_path):
    """Every number of it, with those of the model as the row to compare with."""
    from refusal_kernels.cli import app

    for name in ("harmful", "harmless"):
        file = tmp_path / f"{name}.txt"
        file.write_text("\n".join(toy.prompts(name, "train")[:24]))
    (tmp_path / "text.txt").write_text("sure, it is 4. sure, it is 5.")

    def reproduce(out, *options):
        given = (
            "--model", toy.PATH, "--harmful", tmp_path / "harmful.txt", "--harmless",
            tmp_path / "harmless.txt", "--text", f"pile={tmp_path / 'text.txt'}",
            "--max-new-tokens", 12, "--samples", 0, "--out", tmp_path / out,
        )  # fmt: skip
        arguments = ["reproduce", *map(str, (*given, *options))]
        assert not app(arguments, standalone_mode=False)
        return json.loads((tmp_path / out / "reproduction.json").read_text())

    row = tmp_path / "row.json"
    with set_current_vllm_config(VllmConfig()):  # as for `loaded`
        expected = reproduce("model", "--record", row)
    served = ("--engine", "vllm", "--engine-args", json.dumps(CPU))
    found = reproduce("engine", "--against", row, *served)
    assert found["engine"]["name"] == "vllm" and found["prompts"] == expected["prompts"]
    verdicts = {c["quantity"]: c["verdict"] for c in found["comparisons"]}
    assert set(verdicts) == {c["quantity"] for c in expected["comparisons"]}
    assert {"kl_score", "pile_ablation", "substring_asr_ablation"} <= set(verdicts)
    assert any("an engine's weights are not edited" in note for note in found["notes"])
    for name, verdict in verdicts.items():
        assert verdict == ("no number" if "orthogonalized" in name else "within"), name


@pytest.mark.parametrize(("options", "message"), [
    (["--engine", "vllm", "--adapter", "x"], "--adapter is not for --engine vllm"),
    (["--tensor-parallel-size", "2"], "--tensor-parallel-size is not for --engine transformers"),
    (["--engine", "vllm", "--engine-args", "[1]"], "expected a JSON object"),
    (["--engine", "vllm", "--method", "pca"], "keeps activations"),
    (["--engine", "sglang"], "expected one of transformers, vllm"),
], ids=lambda value: None)  # fmt: skip
def test_what_the_engine_does_not_take_is_refused(options, message, tmp_path):
    from refusal_kernels.cli import app

    with pytest.raises(InputError, match=message):
        app(["extract", "--out", str(tmp_path / "c.safetensors"), *options], standalone_mode=False)
