"""The lm-evaluation-harness end to end, offline, on tasks of our own with the toy model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import run_command, tiny_model, tiny_tokenizer

from refusal_kernels import toy
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.generate import generate
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.patching.handle import is_patched
from refusal_kernels.research.evaluation.rates import Rate
from refusal_kernels.research.extraction.collect import mean_difference
from refusal_kernels.research.reproduction import paper

lm = pytest.importorskip(
    "refusal_kernels.research.evaluation.lm_eval", reason="lm-eval is not installed"
)

LAYER, POSITION, ITEMS = 5, -2, 24

REFUSED = """
task: rk_refused
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: label
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
"""
GROUP = """
group: rk_both
task: [rk_refused, rk_again]
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: true
"""
ANSWERS = """
task: rk_answers
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """No network, and a cache of its own."""
    import datasets
    import huggingface_hub.constants as hub

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hub, "HF_HUB_OFFLINE", True)
        patched.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patched.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patched.setenv("HF_DATASETS_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="module")
def world(offline, tmp_path_factory):
    """The toy model, its refusal direction, and two tasks: which answer is likelier, and skills."""
    folder = tmp_path_factory.mktemp("tasks")
    model, tokenizer = toy.load()
    train = {c: toy.prompts(c, "train")[:64] for c in ("harmful", "harmless")}
    candidates = mean_difference(model, tokenizer, train["harmful"], train["harmless"])
    direction = candidates.at(LAYER, POSITION)
    direction.save(folder / "direction.safetensors")
    chat = ChatFormat(tokenizer)
    # with which word does an answer rather begin: that of a refusal, or one of a plan?
    choices = ["i", "sure", "of"]
    rows = [
        {"prompt": chat.render(prompt), "choices": choices, "label": 0}
        for prompt in toy.prompts("harmful", "test")[:ITEMS]
    ]
    (folder / "refused.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "refused.yaml").write_text(REFUSED.format(data=folder / "refused.jsonl"))
    again = REFUSED.format(data=folder / "refused.jsonl").replace("rk_refused", "rk_again")
    again = again.replace("doc_to_target: label", "doc_to_target: 1")  # to help is right here
    (folder / "again.yaml").write_text(again)
    (folder / "both.yaml").write_text(GROUP)
    asked = [*toy.skills()["arithmetic"][:6], *toy.skills()["facts"][:6]]
    rows = [{"prompt": chat.render(prompt), "answer": answer} for prompt, answer in asked]
    rows[0]["answer"] = "this is wrong."
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "answers.yaml").write_text(ANSWERS.format(data=folder / "answers.jsonl"))
    return model, tokenizer, direction, folder


def test_tasks_of_our_own_unmodified_ablated_and_added(world) -> None:
    model, tokenizer, direction, folder = world
    calls = []
    edits = {
        "unmodified": None,
        "ablated": Ablate(direction),
        "added": Add(direction, block_input=LAYER),
    }
    results = lm.run_tasks(
        model, tokenizer, edits, ["rk_refused", "rk_answers"], include=folder,
        progress=lambda *c: calls.append(c),
    )  # fmt: skip
    assert calls == [(1, 3), (2, 3), (3, 3)]
    refused = {name: tasks["rk_refused"]["acc"] for name, tasks in results.items()}
    assert refused["unmodified"]["k"] == refused["unmodified"]["n"] == ITEMS
    assert refused["ablated"]["k"] <= 2
    assert refused["added"]["k"] == ITEMS
    assert 0.8 < refused["unmodified"]["interval"][0] < refused["unmodified"]["interval"][1] == 1.0
    answers = {name: tasks["rk_answers"]["exact_match"] for name, tasks in results.items()}
    assert answers["unmodified"]["k"] == answers["ablated"]["k"] == 11  # and one made wrong
    assert answers["unmodified"]["n"] == 12 and answers["added"]["k"] < 11
    assert not is_patched(model)
    assert "sorry" in generate(model, tokenizer, toy.prompts("harmful", "test")[:1], 12)[0]


def test_limit_and_unknown_task(world) -> None:
    model, tokenizer, _, folder = world
    results = lm.run_tasks(model, tokenizer, {"x": None}, ["rk_refused"], include=folder, limit=5)
    assert results["x"]["rk_refused"]["acc"]["n"] == 5
    with pytest.raises(InputError, match=r"no task 'rk_refuse'; .*such as .*rk_refused"):
        lm.run_tasks(model, tokenizer, {"x": None}, ["rk_refuse"], include=folder)


def test_a_group_has_the_interval_of_all_its_examples(world) -> None:
    model, tokenizer, _, folder = world
    results = lm.run_tasks(model, tokenizer, {"x": None}, ["rk_both"], include=folder)["x"]
    both = results["rk_both"]["acc"]
    assert (both["k"], both["n"]) == (ITEMS, 2 * ITEMS) and both["value"] == 0.5
    assert both["interval"] == pytest.approx(Rate(ITEMS, 2 * ITEMS).interval)
    assert results["rk_again"]["acc"]["k"] == 0 and results["rk_again"]["acc"]["stderr"] == 0.0


def test_questions_in_the_chat_format_with_a_system_prompt(world, monkeypatch) -> None:
    model, tokenizer, _, folder = world
    seen = []
    render = type(tokenizer).apply_chat_template

    def spy(self, messages, **more):
        seen.append([(m["role"], m["content"][:12]) for m in messages])
        return render(self, messages, **more)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", spy)
    options = {"include": folder, "limit": 2, "chat": True}
    lm.run_tasks(model, tokenizer, {"x": None}, ["rk_answers"], system="sure", **options)
    asked = [messages for messages in seen if len(messages) > 1]
    assert len(asked) >= 2 and all(m[0] == ("system", "sure") for m in asked)
    assert {m[1][0] for m in asked} == {"user"}
    seen.clear()
    lm.run_tasks(model, tokenizer, {"x": None}, ["rk_answers"], **options)
    assert seen and all(role == "user" for messages in seen for role, _ in messages)


def test_benchmarks_of_the_protocol_are_run(world, monkeypatch) -> None:
    model, tokenizer, _, folder = world
    monkeypatch.setattr(paper, "BENCHMARKS", {"mine": ("rk_refused", "acc", 0)})
    benchmarks = paper.Benchmarks(lm.find_tasks(["rk_refused"], folder), limit=5)
    results = benchmarks(model, tokenizer)
    assert results["mine"]["acc"]["value"] == 1.0 and results["mine"]["acc"]["n"] == 5
    assert list(results["mine"]) == ["acc"]


@pytest.mark.full
def test_evaluate_puts_it_into_json_and_page(world, tmp_path, capsys) -> None:
    *_, folder = world
    arguments = (
        f"evaluate --direction {folder / 'direction.safetensors'} --quick --max-prompts 6 "
        f"--strengths 1 --random-controls 1 --max-new-tokens 12 --lm-eval rk_both "
        f"--lm-eval-include {folder} --limit 4 --report {tmp_path / 'page.html'} "
        f"--json {tmp_path / 'all.json'}"
    )
    assert run_command(*arguments.split()) == 0
    document = json.loads((tmp_path / "all.json").read_text())
    assert set(document["lm_eval"]) == {"unmodified", "ablated", "added"}
    assert list(document["lm_eval"]["unmodified"]) == ["rk_both"]
    assert document["lm_eval_parts"]["ablated"]["rk_refused"]["acc"]["n"] == 4
    page = (tmp_path / "page.html").read_text()
    assert "rk_both" in page and "rk_again" not in page and "--lm-eval rk_both" in page
    shown = capsys.readouterr().out
    assert "rk_both acc" in shown and "Necessity (intervals apart)" in shown


def test_what_was_measured_is_written_where_the_harness_fails(
    world, tmp_path, capsys, monkeypatch
) -> None:
    *_, folder = world

    def fail(**_):
        raise ValueError("Dataset scripts are no longer supported")

    monkeypatch.setattr("lm_eval.simple_evaluate", fail)
    out = tmp_path / "all.json"
    arguments = (
        f"evaluate --direction {folder / 'direction.safetensors'} --max-prompts 2 --strengths= "
        f"--random-controls 0 --layer-controls 0 --max-new-tokens 4 --lm-eval rk_both "
        f"--lm-eval-include {folder} --json {out}"
    )
    assert run_command(*arguments.split()) == 2
    assert "lm-eval cannot run rk_both: ValueError: Dataset scripts" in capsys.readouterr().err
    assert "ablated" in json.loads(out.read_text())["conditions"]


@pytest.mark.full
def test_its_command_line_knows_the_model_type(world, tmp_path) -> None:
    _, _, _, folder = world
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    model_args = f"pretrained=toy,direction={folder / 'direction.safetensors'}"
    done = subprocess.run(
        [
            sys.executable, "-m", "refusal_kernels.research.evaluation.lm_eval", "run",
            "--model", "refusal_kernels", "--model_args", model_args, "--tasks", "rk_refused",
            "--include_path", folder, "--batch_size", "8", "--device", "cpu",
            "--output_path", tmp_path / "out",
        ],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(Path(file).read_text())["results"]["rk_refused"]["acc,none"] <= 2 / ITEMS


def test_a_folder_that_does_not_hold_its_model_is_refused(tmp_path) -> None:
    tiny_model(vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    whole = lm.SteeredLM(str(tmp_path), device="cpu")
    assert whole.model.generation_config.temperature is None
    whole.close()
    file = tmp_path / "model.safetensors"
    named = {k.replace("layers.", "blocks."): v for k, v in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="its files lack the weight model"):
        lm.SteeredLM(str(tmp_path), device="cpu")


def test_an_adapter_and_a_delta_exclude_each_other(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="peft and delta exclude each other"):
        lm.SteeredLM(pretrained=str(tmp_path), intervention="none", peft="a", delta="b")


def test_arguments_of_the_model_type(tmp_path) -> None:
    direction = Direction(torch.randn(64), layer=1, position=-1)
    path = tmp_path / "d.safetensors"
    direction.save(path)
    edit = lm.intervention_of(path, "ablate", strength=0.5, sites="attn+mlp", layers="1+2")
    assert edit.strength == 0.5 and edit.sites == ("attn", "mlp") and edit.layers == (1, 2)
    edit = lm.intervention_of(path, "add", coefficient=-1.0)
    assert isinstance(edit, Add) and edit.block_input == 1 and edit.coefficient == -1.0
    assert lm.intervention_of(path, "ablate", layers=2).layers == (2,)
    assert lm.intervention_of(path, "none") is None and lm.intervention_of(None) is None
    for arguments, words in (
        ({"direction": path, "intervention": "erase"}, "erase needs 'v'"),
        ({"direction": path, "intervention": "no"}, "expected one of ablate, add, set, .*, none"),
        ({"direction": None, "intervention": "add"}, "direction=FILE is needed"),
        ({"direction": path, "layers": "a+b"}, "layers names 'a'"),
        ({"direction": tmp_path / "no"}, "is not there"),
    ):
        with pytest.raises(InputError, match=words):
            lm.intervention_of(**arguments)
    model = tiny_model()
    steered = lm.SteeredLM(model, direction=path, tokenizer=tiny_tokenizer())
    assert steered.handle.report().claimed == 7
    steered.close()
    assert not is_patched(model)
