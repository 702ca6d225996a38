"""The vLLM plugin's configuration and requests: they need no vLLM."""

import pytest
import torch

from refusal_kernels import Ablate, Add, Clamp, Direction, Erase, InputError, Set
from refusal_kernels.vllm.config import parse_settings
from refusal_kernels.vllm.names import RESOLVED
from refusal_kernels.vllm.programs import parse_program
from refusal_kernels.vllm.requests import Steering, cache_salt, read_steering


@pytest.fixture
def settings(tmp_path, directions):
    for name, direction in directions.items():
        direction.save(tmp_path / name)
    files = {name: str(tmp_path / name) for name in directions}

    def parse(**others):
        return parse_settings({"directions": files, **others})

    return parse


# --- configuration


def test_programs_are_read(directions):
    given = [
        {"ablate": "r", "strength": 0.5, "layers": [1, 2]},
        {"add": "t", "coefficient": 2, "block_input": 3},
        {"set": "t", "value": 1.5, "sites": ["mlp"]},
        {"clamp": "t", "high": 0},
    ]
    program = parse_program("p", given, directions)
    ablate, add, fixed, clamp = program.interventions
    assert [type(i) for i in program.interventions] == [Ablate, Add, Set, Clamp]
    assert (ablate.strength, ablate.layers) == (0.5, (1, 2))
    assert (add.coefficient, add.block_input) == (2.0, 3)
    assert (fixed.value, fixed.sites) == (1.5, ("mlp",))
    assert (clamp.low, clamp.high) == (float("-inf"), 0.0)
    assert program.version == parse_program("q", given, directions).version


def test_an_erasure_names_three_vectors(directions):
    u, v = directions["r"].vector, directions["t"].vector + directions["r"].vector / 9
    given = {**directions, "v": Direction(v), "mean": Direction(torch.arange(8.0))}
    named = {"erase": "r", "v": "v", "bias": "mean", "strength": 0.5, "layers": [1]}
    (erase,) = parse_program("p", named, given).interventions
    assert isinstance(erase, Erase) and (erase.strength, erase.layers) == (0.5, (1,))
    (slot,) = erase.slots(1.0)
    assert torch.equal(slot.write, u) and torch.equal(slot.read, v)
    assert torch.equal(erase.bias, torch.arange(8.0))
    del named["bias"]
    (without,) = parse_program("p", named, given).interventions
    assert without.bias is None and without.slots(1.0)[0].b == 0.0
    assert (
        parse_program("p", named, given).version
        != parse_program("p", {**named, "bias": "mean"}, given).version
    )
    for wrong, words in (
        ({"erase": "r"}, "erase needs 'v'"),
        ({"erase": "r", "v": "x"}, "no direction 'x'"),
        ({"erase": "r", "v": "t"}, "u . v is"),
        ({"ablate": "r", "v": "t"}, "ablate takes no 'v'"),
    ):
        with pytest.raises(InputError, match=words):
            parse_program("p", wrong, given)


def test_the_version_changes_with_all_that_changes_the_result(directions):
    other = {**directions, "r": Direction(directions["r"].vector * 2)}
    variants = [
        ({"add": "r", "sites": "all"}, directions),
        ({"add": "r", "sites": "all"}, other),
        ({"add": "t", "sites": "all"}, directions),
        ({"add": "r", "coefficient": 2, "sites": "all"}, directions),
        ({"add": "r", "strength": 2, "layers": [0]}, directions),
        ({"add": "r", "block_input": 1}, directions),
        ({"add": "r", "layers": [1]}, directions),
        ({"add": "r", "sites": ["mlp"]}, directions),
        ({"ablate": "r"}, directions),
        ([{"add": "r", "sites": "all"}, {"ablate": "t"}], directions),
    ]
    versions = [parse_program("p", given, those).version for given, those in variants]
    assert len(set(versions)) == len(versions)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ([], "empty list"),
        ("ablate", "is a str"),
        ({}, "no intervention"),
        ({"ablate": "r", "add": "r"}, "ablate and add"),
        ({"ablate": "x"}, "no direction 'x'; there are: r, t"),
        ({"ablate": ["r"]}, "no direction"),
        ({"ablate": "r", "value": 1}, "takes no 'value'"),
        ({"ablate": "r", "positions": "last"}, "takes no 'positions'"),
        ({"set": "r"}, "needs 'value'"),
        ({"ablate": "r", "strength": "1"}, "strength is '1'"),
        ({"ablate": "r", "strength": True}, "strength is True"),
        ({"ablate": "r", "strength": float("nan")}, "strength is nan"),
        ({"ablate": "r", "block_input": "3"}, "block_input is '3'"),
        ({"ablate": "r", "block_input": -1}, "block_input is -1"),
        ({"add": "r"}, "does not say at which layer"),
        ({"ablate": "r", "layers": []}, r"layers is \[\]"),
        ({"ablate": "r", "sites": ["nowhere"]}, "no site 'nowhere'"),
        ({"ablate": "r", "block_input": 1, "sites": ["mlp"]}, "not both"),
        ({"clamp": "r", "low": 2, "high": 1}, "above high"),
    ],
)
def test_malformed_programs_are_refused(settings, program, words):
    with pytest.raises(InputError, match=words):
        settings(programs={"p": program})


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"program": {}}, "has 'program'; expected directions"),
        ({"programs": []}, "programs is a list"),
        ({"programs": {"none": {"ablate": "r"}}}, "can not be the name"),
        ({"programs": {"": {"ablate": "r"}}}, "can not be the name"),
        ({"default": "a"}, "default is 'a'"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": True}, "slots is True"),
        ({"fuse_norms": "no"}, "fuse_norms is 'no'"),
        ({"slots": 1, "programs": {"p": [{"ablate": "r"}, {"ablate": "t"}]}}, "slots is 1, but"),
        ({"directions": {"r": 3}}, "direction 'r' is a int"),
        ({"directions": {"r": "/nowhere"}}, "is not there"),
        ({"monitor": {"direction": "x", "block_input": 1}}, "monitor: there is no direction 'x'"),
        ({"monitor": {"direction": "r"}}, "expected null or an object"),
    ],
)
def test_malformed_settings_are_refused(settings, others, words):
    with pytest.raises(InputError, match=words):
        settings(**others)
    with pytest.raises(InputError, match="expected an object"):
        parse_settings(3)


# --- requests


@pytest.fixture
def programs(directions):
    return {name: parse_program(name, {"ablate": name}, directions) for name in directions}


def test_requests_are_read(programs):
    r = programs["r"].version
    for extra, default, wanted in (
        (None, None, None),
        ({}, "r", Steering(r, 1.0)),
        ({"other": 3}, "r", Steering(r, 1.0)),
        ({"steer": {"program": "r", "strength": 0.7}}, None, Steering(r, 0.7)),
        ({"steer": "r", "steer_strength": 2}, None, Steering(r, 2.0)),
        ({"steer_strength": 0.5}, "r", Steering(r, 0.5)),
        ({"steer": {"strength": 0.5}}, "r", Steering(r, 0.5)),
        ({"steer": "none"}, "r", None),
        ({"steer": None}, "r", None),
        ({"steer": {"program": None}}, "r", None),
        ({"steer": {"program": "r", "strength": 0}}, "t", None),
    ):
        assert read_steering(extra, programs, default) == wanted, extra


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"steer": "x"}, "no program 'x'; there are: r, t, none"),
        ({"steer": 3}, "no program 3"),
        ({"steer": ["r"]}, "no program"),
        ({"steer": {"program": "r", "strenght": 1}}, "has 'strenght'"),
        ({"steer": {"program": "r", "strength": "much"}}, "is 'much'; expected a finite number"),
        ({"steer": {"program": "r", "strength": float("inf")}}, "finite"),
        ({"steer": {"program": "r"}, "steer_strength": 1.0}, "not both"),
        ({"steer": "none", "steer_strength": "x"}, "finite"),
        ({RESOLVED: ["0", 1.0]}, "set by the engine itself"),
    ],
)
def test_malformed_requests_are_refused(programs, extra, words):
    with pytest.raises(InputError, match=words):
        read_steering(extra, programs, "r")


def test_prefixes_are_salted_by_program_and_strength():
    plain = [cache_salt(salt, None) for salt in (None, "tenant")]
    assert plain == [None, "tenant"]
    asked = [Steering(v, s) for v in ("a", "b") for s in (1.0, 0.5)]
    salts = [cache_salt(salt, s) for s in asked for salt in (None, "tenant")]
    assert len(set(salts)) == len(salts)
    assert cache_salt("x", Steering("a", 1.0)) == cache_salt("x", Steering("a", 1.0))
