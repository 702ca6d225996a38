"""What the server checks and reads without vLLM: requests over HTTP, and settings in a file."""

import contextlib
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from refusal_kernels import Ablate, Direction, InputError
from refusal_kernels.vllm.config import parse_settings
from refusal_kernels.vllm.engine import Engine
from refusal_kernels.vllm.frontend import Catalog
from refusal_kernels.vllm.http_requests import check_request, list_programs, resolve_model
from refusal_kernels.vllm.limits import Limits
from refusal_kernels.vllm.names import CATALOG
from refusal_kernels.vllm.programs import NamedProgram
from refusal_kernels.vllm.spans import Span

LIMITS = Limits(8, 30, torch.bfloat16, 2.0)


class Completion(SimpleNamespace):
    """As a request of vLLM's that takes ``vllm_xargs``."""

    model_fields = ("model", "vllm_xargs")


class Batch(SimpleNamespace):
    """As a batch of chats, which makes single ones of all its fields."""

    def to_chat_completion_request(self):
        """See above."""


def test_requests_of_the_server_that_would_be_unsteered_are_refused():
    def request(extra=None, beam=False, **others):
        return Completion(model_extra=others, vllm_xargs=extra, use_beam_search=beam)

    for good in (request(), request({"steer": "r"}), request({"a": 1}, beam=True, user="u")):
        check_request(good)
    check_request(SimpleNamespace(model="no extra fields"))
    elsewhere = {"vllm_xargs": {"steer": "r"}}
    check_request(Batch(model_extra=elsewhere))
    for bad, words in (
        (request(steer="r"), "'steer' outside 'vllm_xargs'"),
        (request(steering="r"), "has 'steering'; expected 'steer'"),
        (request(extra_body={"steer": "r"}), "'steer' in 'extra_body'; expected it in"),
        (request(extra_body={"vllm_xargs": {"steer": "r"}}), "'steer' in 'extra_body'; expected"),
        (request(sampling=[{"extra_args": {"steering": 1}}]), "has 'steering'; expected 'steer'"),
        (request({"steering": "r"}, beam=True), "has 'steering'; expected 'steer'"),
        (request({"steer": "r"}, beam=True), "a beam search takes no 'steer'"),
        (request({"steer_strength": 1}, beam=True), "a beam search"),
        (SimpleNamespace(model_extra=elsewhere), "'steer' in 'vllm_xargs'; .* completions alone"),
    ):
        with pytest.raises(InputError, match=words):
            check_request(bad)
    prompt = NamedProgram((), "v", span=Span("prompt"))
    check_request(request(), prompt)
    check_request(request(beam=True), NamedProgram((), "v"))
    with pytest.raises(InputError, match="not steered by a default program with positions"):
        check_request(request(beam=True), prompt)


# --- settings in a file, and their reload


@pytest.fixture
def files(directions, tmp_path):
    for name, direction in directions.items():
        direction.save(tmp_path / name)

    def write(text, suffix="json"):
        path = tmp_path / f"settings.{suffix}"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return str(path)

    return write


FILE = {
    "directions": {"r": "r"},
    "programs": {"p": {"ablate": "r"}, "q": {"add": "r", "layers": [1]}},
    "default": "p",
}


def test_settings_are_read_from_a_file(files):
    toml = """
        default = "p"
        [directions]
        r = "r"  # beside the file
        [programs]
        p = {ablate = "r"}
        [programs.q]
        add = "r"
        layers = [1]
    """
    read = [parse_settings({"file": files(FILE)}), parse_settings({"file": files(toml, "toml")})]
    for settings in read:
        assert list(settings.programs) == ["p", "q"] and settings.default == "p"
        assert settings.programs["q"].version == read[0].programs["q"].version
    more = {"programs": {"s": {"ablate": "r"}}, "default": None}
    beside = parse_settings({"file": files(FILE), **more})
    assert list(beside.programs) == ["p", "q", "s"] and beside.default is None


@pytest.mark.parametrize(
    ("text", "others", "words"),
    [
        ("{", {}, "settings.json is not JSON"),
        ("[]", {}, "must hold an object of settings"),
        ({"file": "x"}, {}, "without 'file'"),
        ({"program": {}}, {}, "has 'program'"),
        ({"programs": []}, {}, "programs of .* must be an object"),
        (FILE, {"programs": {"p": {"ablate": "r"}}}, "'p' of programs is in .* and beside it"),
        (FILE, {"file": 3}, "file is 3; expected the path"),
        (FILE, {"file": "/nowhere.json"}, "is not there; expected a JSON or TOML file"),
    ],
)
def test_malformed_files_are_refused(files, text, others, words):
    with pytest.raises(InputError, match=words):
        parse_settings({"file": files(text), **others})
    with pytest.raises(InputError, match=r"settings\.toml is not TOML"):
        parse_settings({"file": files("a = [", "toml")})


def test_a_reload_brings_what_a_fresh_start_would_have(files, directions):
    given = {"file": files(FILE), "programs": {"s": {"ablate": "r"}}}
    catalog = Catalog(parse_settings(given, LIMITS), 1)
    change = catalog.plan({"posted": {"ablate": "t"}}, {"t": directions["t"]})
    catalog.commit(change, [None])
    assert set(catalog.programs) == {"p", "q", "s", "posted"}
    files({**FILE, "programs": {"p": {"ablate": "r", "strength": 0.5}}, "default": None})
    before = catalog.programs
    change = catalog.plan_reload()
    with pytest.raises(InputError, match="because"):
        catalog.commit(change, [None, "because"])
    assert catalog.programs is before and catalog.default == "p"
    catalog.commit(change, [None, None])
    assert set(catalog.programs) == {"p", "s"} and catalog.default is None
    assert set(catalog.directions) == {"r"}
    assert catalog.programs["p"].version != before["p"].version
    vectors, specifications, named = change.arguments
    assert vectors["r"][0] == directions["r"].vector.tolist()
    assert set(specifications) == {"p", "s"}
    assert named == sorted(p.version for p in catalog.programs.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"programs": {"p": {"ablate": "x"}}}, "no direction 'x'"),
        (
            {"programs": {"p": [{"ablate": "r"}, {"add": "r", "layers": [1]}]}},
            "started with slots 1",
        ),
        ({"fuse_norms": False}, "fuse_norms cannot change"),
        ({"max_strength": 3}, "max_strength cannot change"),
        ({"monitor": {"direction": "r", "block_input": 1}}, "monitor cannot change"),
        ({"reads": 1}, "reads cannot change"),
        ({"default": "x"}, "default is 'x'"),
    ],
)
def test_reloads_are_refused(files, changes, words):
    catalog = Catalog(parse_settings({"file": files(FILE)}, LIMITS), 1)
    files({**FILE, **changes})
    with pytest.raises(InputError, match=words):
        catalog.plan_reload()


def test_a_reload_does_not_change_the_direction_that_is_watched(files, tmp_path):
    settings = {**FILE, "monitor": {"direction": "r", "block_input": 1}}
    catalog = Catalog(parse_settings({"file": files(settings)}, LIMITS), 1)
    catalog.plan_reload()
    Direction(torch.randn(8)).save(tmp_path / "r")
    with pytest.raises(InputError, match="direction 'r' is watched; it cannot change"):
        catalog.plan_reload()


def test_a_direction_goes_with_the_last_program_that_names_it(files, directions):
    catalog = Catalog(parse_settings({"file": files(FILE)}, LIMITS), 1)

    def change(programs, **new):
        made = catalog.plan(programs, new)
        catalog.commit(made, [None])
        return set(made.vectors), set(catalog.directions)

    t, all_of_them = directions["t"], {"r", "t", "later"}
    named = {"a": {"ablate": "t"}, "b": [{"set": "t", "value": 1.0}]}
    assert change(named, t=t, later=t) == ({"t"}, all_of_them)  # what is named is sent alone
    assert change({"a": None, "q": None}) == (set(), all_of_them)
    assert change({"b": {"ablate": "r"}}) == ({"r"}, {"r", "later"})
    assert change({"a": {"ablate": "later"}, "b": None}) == ({"later"}, {"r", "later"})
    assert change({"a": None}, later=t) == (set(), {"r", "later"})  # given anew


def test_positions_of_a_prompt_that_comes_in_parts_are_refused(files):
    catalog = Catalog(parse_settings({"file": files(FILE)}, LIMITS), 1)
    for steer in ({"positions": "prompt"}, {"from": 1}, {"to": 9}):
        sampling = SimpleNamespace(extra_args={"steer": {"program": "p", **steer}})
        request = SimpleNamespace(
            sampling_params=sampling, pooling_params=None, prompt_token_ids=[5, 6], resumable=True
        )
        with pytest.raises(InputError, match="whose prompt comes in parts is steered at all"):
            catalog.resolve(request)


# --- rk.Engine, without the engine


@pytest.fixture
def engine(files, directions, monkeypatch):
    """An `Engine` on a catalog whose workers make every change."""
    monkeypatch.setattr("refusal_kernels.vllm.frontend.counted_change", contextlib.nullcontext)
    catalog = Catalog(parse_settings({"file": files(FILE)}, LIMITS), 1)
    made = Engine.__new__(Engine)
    processor = SimpleNamespace(**{CATALOG: catalog})
    made.llm = SimpleNamespace(
        llm_engine=SimpleNamespace(input_processor=processor),
        collective_rpc=lambda method, args: [None],
    )
    made._numbers, made._named, made._edits = itertools.count(), {}, (None,)
    made.catalog = catalog
    return made


def names(engine, *edits):
    with engine.under(edits):
        return engine._programs_of([[5]] * len(edits))


def test_an_edit_that_is_refused_leaves_no_name(engine, directions):
    good, bad = Ablate(directions["r"]), Ablate(directions["r"], 8.0)
    with pytest.raises(InputError, match="overflow"):
        names(engine, good, bad)
    assert set(engine.catalog.programs) == {"p", "q"}
    (name,) = names(engine, good)
    assert name in engine.catalog.programs and names(engine, good, "p") == [name, "p"]


def test_the_oldest_edits_make_room_beside_named_programs(engine, directions, monkeypatch):
    for module in ("frontend", "engine"):
        monkeypatch.setattr(f"refusal_kernels.vllm.{module}.MOST_PROGRAMS", 4)
    for strength in (0.1, 0.2, 0.3, 0.4, 0.5):
        (name,) = names(engine, Ablate(directions["t"], strength))
        assert {"p", "q", name} <= set(engine.catalog.programs)
        assert len(engine.catalog.programs) < 4
        assert engine.refusal(Ablate(directions["t"])) is None
    assert len(engine.catalog.directions) == len(engine.catalog.programs) - 1  # of p and q: r


def test_programs_are_not_without_number(files):
    catalog = Catalog(parse_settings({"file": files(FILE)}, LIMITS), 1)
    with pytest.raises(InputError, match="more than 1024 programs"):
        catalog.plan({f"p{k}": {"ablate": "r"} for k in range(1024)}, {})


def test_a_reload_needs_a_file_and_one_server(files):
    with pytest.raises(InputError, match="started without a 'file'"):
        Catalog(parse_settings({}), 1).plan_reload()
    with pytest.raises(InputError, match="2 API servers"):
        Catalog(parse_settings({"file": files(FILE)}), 2).plan_reload()


# --- models named with a program


def asked(model, extra=None):
    return Completion(model=model, vllm_xargs=extra)


@pytest.mark.parametrize(
    ("model", "extra", "left", "steer"),
    [
        ("m", None, "m", None),
        (None, None, None, None),
        ("m:p", None, "m", "p"),
        ("m:none", {"a": 1}, "m", "none"),
        ("m:p", {"steer": "p"}, "m", "p"),
        ("m:8b", None, "m:8b", None),
        ("m:8b:q:1", None, "m:8b", "q:1"),
        ("other:p", None, "other:p", None),
    ],
)
def test_a_model_names_a_program(model, extra, left, steer):
    request = asked(model, extra)
    resolve_model(request, ["m", "m:8b"], ["p", "q:1"])
    assert request.model == left
    assert request.vllm_xargs == ((extra or {}) | {"steer": steer} if steer else extra)


def test_models_with_programs_that_are_not_there():
    for request, words in (
        (asked("m:x"), "model 'm' has no program 'x'; there are: p, none"),
        (asked("m:p", {"steer": "none"}), "the model names program 'p', and 'steer' names 'none'"),
    ):
        with pytest.raises(InputError, match=words):
            resolve_model(request, ["m"], ["p"])
    batch = Batch(model="m:p")
    resolve_model(batch, ["m"], ["p"])
    assert batch.model == "m" and batch.vllm_xargs == {"steer": "p"}
    tokenize = SimpleNamespace(model="m:p")
    resolve_model(tokenize, ["m"], ["p"])
    assert tokenize.model == "m:p"  # vLLM answers that there is no such model


def test_programs_are_listed_as_models():
    class Card(SimpleNamespace):
        def model_copy(self, update):
            return Card(**{**vars(self), **update})

    for default, names in ((None, ["m", "m:p", "m:q"]), ("p", ["m", "m:p", "m:q", "m:none"])):
        cards = [Card(id="m", parent=None, root="/m")]
        list_programs(cards, {"p": None, "q": None}, default)
        assert [card.id for card in cards] == names
        assert {card.parent for card in cards[1:]} == {"m"} and cards[-1].root == "/m"
