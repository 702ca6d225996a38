"""The vLLM plugin's configuration and requests: they need no vLLM."""

import random
from types import SimpleNamespace

import pytest
import torch

from refusal_kernels import Ablate, Add, Clamp, Direction, Erase, InputError, Set
from refusal_kernels.vllm.config import parse_settings
from refusal_kernels.vllm.frontend import Catalog
from refusal_kernels.vllm.limits import Limits
from refusal_kernels.vllm.names import READ, RESOLVED
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
        ({"ablate": "r", "positions": "last"}, directions),
        ({"ablate": "r", "from": 3}, directions),
        ({"ablate": "r", "to": 3}, directions),
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
        ({"ablate": "r", "positions": "first"}, "positions is 'first'; expected all, prompt"),
        ({"ablate": "r", "from": -1}, "from is -1; expected the position of a token"),
        ({"ablate": "r", "from": 5, "to": 5}, "to is 5; expected more than from, which is 5"),
        ([{"ablate": "r"}, {"ablate": "t", "positions": "last"}], "different positions"),
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
        ({"programs": {"none": {"ablate": "r"}}}, "cannot be the name"),
        ({"programs": {"": {"ablate": "r"}}}, "cannot be the name"),
        ({"default": "a"}, "default is 'a'"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": True}, "slots is True"),
        ({"fuse_norms": "no"}, "fuse_norms is 'no'"),
        ({"max_strength": "2"}, "max_strength is '2'"),
        ({"max_strength": 0}, "max_strength is 0.0; expected a number above 0"),
        ({"slots": 1, "programs": {"p": [{"ablate": "r"}, {"ablate": "t"}]}}, "slots is 1, but"),
        ({"directions": {"r": 3}}, "direction 'r' is an int"),
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
        ({"steer": {"program": "r", "positions": "some"}}, "positions is 'some'"),
        ({"steer": "r", "steer_from": 1.5}, "from is 1.5"),
        ({"steer": {"program": "r"}, "steer_to": 3}, "give the to in steer or as steer_to"),
    ],
)
def test_malformed_requests_are_refused(programs, extra, words):
    with pytest.raises(InputError, match=words):
        read_steering(extra, programs, "r")


@pytest.mark.parametrize(
    ("program", "request_", "window"),
    [
        ({}, {}, (0, None, False)),
        ({"positions": "prompt"}, {}, (0, 10, False)),
        ({}, {"positions": "prompt"}, (0, 10, False)),
        ({"positions": "generated"}, {}, (10, None, False)),
        ({"positions": "last"}, {}, (9, None, False)),
        ({"from": 3, "to": 8}, {}, (3, 8, False)),
        ({"from": 3}, {"to": 8}, (3, 8, False)),
        ({"from": 3}, {"from": 5, "to": 12}, (5, 12, True)),
        ({"from": 12}, {}, (12, None, True)),
        ({"positions": "last"}, {"to": 15}, (9, 15, True)),
        ({"positions": "prompt"}, {"positions": "last"}, (9, 10, False)),
        ({"positions": "prompt"}, {"positions": "generated"}, None),
        ({"to": 3}, {"from": 3}, None),
    ],
)
def test_positions_of_a_program_and_a_request_restrict_each_other(
    directions, program, request_, window
):
    programs = {"p": parse_program("p", {"ablate": "r", **program}, directions)}
    wanted = window and Steering(programs["p"].version, 1.0, *window)
    flat = {f"steer_{key}": value for key, value in request_.items()}
    for extra in ({"steer": {"program": "p", **request_}}, {"steer": "p", **flat}):
        assert read_steering(extra, programs, None, prompt=10) == wanted


def test_prefixes_are_salted_by_program_and_strength():
    plain = [cache_salt(salt, None) for salt in (None, "tenant")]
    assert plain == [None, "tenant"]
    windows = ((0, None), (0, 5), (5, None))
    asked = [Steering(v, s, *w) for v in ("a", "b") for s in (1.0, 0.5) for w in windows]
    salts = [cache_salt(salt, s) for s in asked for salt in (None, "tenant")]
    assert len(set(salts)) == len(salts)
    assert cache_salt("x", Steering("a", 1.0)) == cache_salt("x", Steering("a", 1.0))


# --- how strong a program may be


def limits(dtype=torch.bfloat16, blocks=30, strength=2.0):
    return Limits(8, blocks, dtype, strength)


def test_the_strengths_of_an_ablation_keep_a_row_as_long_as_it_was(directions):
    """30 blocks have 61 places; a negative strength multiplies at each of them."""
    least, largest = parse_program("p", {"ablate": "r"}, directions, limits()).strengths
    assert largest == pytest.approx(2.0, rel=1e-5)
    assert (1 - least) ** 61 == pytest.approx(100)
    weaker = parse_program("p", {"ablate": "r", "strength": 0.5}, directions, limits())
    assert weaker.strengths == pytest.approx((2 * least, 4.0), rel=1e-5)
    one = {"ablate": "r", "block_input": 3}
    assert parse_program("p", one, directions, limits()).strengths == pytest.approx((-2.0, 2.0))
    raised = parse_program("p", one, directions, limits(strength=50.0)).strengths
    assert raised == pytest.approx((-50.0, 50.0))
    raised = parse_program("p", {"ablate": "r"}, directions, limits(strength=50.0)).strengths
    assert 1 < largest < raised[1] < 2.1  # the stream would overflow


def test_the_strengths_of_other_edits(directions):
    given = directions
    least, largest = parse_program("p", {"add": "r", "block_input": 1}, given, limits()).strengths
    assert -least == largest == pytest.approx(1e12 / 3)
    fp16 = parse_program("p", {"add": "r", "sites": "all"}, given, limits(torch.float16))
    assert fp16.strengths[1] == pytest.approx(1e4 / 3 / 61)
    # by 1.1 at each of 61 places, 334 in all
    backwards = {"ablate": "r", "strength": -0.1}
    for dtype, growth in ((torch.bfloat16, 100.0), (torch.float16, 20.0)):
        with pytest.raises(InputError, match="overflow"):
            parse_program("p", backwards, given, limits(dtype))
        weaker = parse_program("p", {**backwards, "strength": -0.01}, given, limits(dtype))
        assert (1 + 0.01 * weaker.strengths[1]) ** 61 == pytest.approx(growth, rel=1e-3)
    rotate = {"rotate": "r", "b2": "t", "angle": 180.0}  # by -1 at strength 1, by -3 at 2
    assert parse_program("p", rotate, given, limits()).strengths[1] == pytest.approx(
        1 + (100 ** (1 / 61) - 1) / 2, rel=1e-4
    )
    clamp = parse_program("p", {"clamp": "r", "high": 0.0}, given, limits()).strengths
    assert clamp == pytest.approx((1 - 100 ** (1 / 61), 2.0), rel=1e-4)
    assert parse_program("p", {"set": "r", "value": 5}, given, limits()).strengths[1] > 1


def test_an_edit_may_not_write_far_more_than_it_reads():
    """Erase leaves nothing along v, and writes along u as much as v, which may be long, reads."""
    for length, largest in ((1.0, 2.0), (70.0, 100 / (1 + 70.0**2) ** 0.5), (1e6, None)):
        u, v = torch.eye(8)[0], torch.eye(8)[0] + length * torch.eye(8)[1]
        given = {"u": Direction(u), "v": Direction(v)}
        if largest is None:
            with pytest.raises(InputError, match=r"erase 'u' must be weaker, .* of 1\.6.*e-06"):
                parse_program("p", {"erase": "u", "v": "v"}, given, limits())
        else:
            program = parse_program("p", {"erase": "u", "v": "v"}, given, limits())
            assert program.strengths[1] == pytest.approx(largest, rel=1e-4)


E = torch.eye(8)
VECTORS = {
    **{"e1": E[0], "e2": E[1], "e3": E[2]},
    **{"e1+3e2": E[0] + 3 * E[1], "e1+70e2": E[0] + 70 * E[1], "e2+70e1": E[1] + 70 * E[0]},
    **{f"e{k + 1}+13e8": E[k] + 13 * E[7] for k in range(3)},
}
ONE = {"erase": "e1", "v": "e1+70e2", "sites": ["attn"]}
OTHER = {"erase": "e2", "v": "e2+70e1", "sites": ["mlp"]}
SLANTED = {"erase": "e1", "v": "e1+3e2"}
TURN = {"rotate": "e1", "b2": "e2", "angle": 90.0}


def test_edits_at_different_places_may_not_feed_each_other():
    """Each alone is a projection or a rotation; one after the other they lengthen a row."""
    given = {name: Direction(vector) for name, vector in VECTORS.items()}
    for pair in ([ONE, OTHER], [{**SLANTED, "sites": ["attn"]}, {**TURN, "sites": ["mlp"]}]):
        for alone in pair:
            parse_program("p", alone, given, limits())
        with pytest.raises(InputError, match=r"'p' can make .* overflow; erase 'e1' and .* weaker"):
            parse_program("p", pair, given, limits())


@pytest.mark.parametrize(
    "program",
    [
        SLANTED,
        [SLANTED, {"ablate": "e3"}],
        [SLANTED, {"add": "e2", "layers": [1]}],
        [{"erase": name, "v": f"{name}+13e8"} for name in ("e1", "e2", "e3")],  # of rank three
        TURN,
        [{**TURN, "sites": ["attn"]}, {"ablate": "e1+3e2", "sites": ["mlp"]}],
        [{"clamp": "e1", "high": 0.0, "layers": [1]}, {"set": "e1+3e2", "value": 1, "layers": [2]}],
        [{"ablate": "e1+3e2", "layers": [k], "strength": 2} for k in range(16)],
    ],
)
def test_edits_that_do_not_are_taken(program):
    given = {name: Direction(vector) for name, vector in VECTORS.items()}
    assert parse_program("p", program, given, limits()).strengths[1] >= 1
    if isinstance(program, list) and len(program) == 3:  # they may make a row 39 times as long
        with pytest.raises(InputError, match="overflow"):
            parse_program("p", program, given, limits(torch.float16))
    else:
        assert parse_program("p", program, given, limits(torch.float16)).strengths[1] >= 1


def product(program, strength):
    """Return how many times longer a row becomes, at most, over any places in a row."""
    most, past = 1.0, [torch.eye(8).double()]
    for there in limits().places(program.interventions):
        terms = [slot for i in there for slot in i.slots(i.strength * strength)]
        step = past[0] + sum(s.a * torch.outer(s.write, s.read).double() for s in terms)
        past = [past[0], *(step @ one for one in past)]
        most = max(most, *(float(torch.linalg.matrix_norm(one, 2)) for one in past))
    return most


def test_no_program_lengthens_a_row_more_than_a_hundred_times():
    generator = random.Random(0)
    longest = []
    for _ in range(30):
        given, edits = {}, []
        for k in range(generator.randint(1, 3)):
            q, _ = torch.linalg.qr(torch.randn(8, 2))
            slant, length = 10 ** generator.uniform(-2, 2), 10 ** generator.uniform(-2, 2)
            given |= {f"a{k}": Direction(q[:, 0]), f"b{k}": Direction(q[:, 1])}
            given[f"u{k}"] = Direction(length * q[:, 0])
            given[f"v{k}"] = Direction((q[:, 0] + slant * q[:, 1]) / length)
            edits.append(
                generator.choice(
                    [
                        {"ablate": f"a{k}"},
                        {"erase": f"u{k}", "v": f"v{k}"},
                        {"rotate": f"a{k}", "b2": f"b{k}", "angle": 100.0},
                    ]
                )
                | {"strength": 1e-6 * generator.choice([1, -1, 2])}
                | generator.choice([{}, {"sites": ["attn"]}, {"sites": ["mlp"]}, {"layers": [3]}])
            )
        try:
            program = parse_program("p", edits, given, limits())
        except InputError as error:
            assert "several directions at one place" in str(error)
            continue
        longest += [product(program, strength) for strength in program.strengths]
    assert len(longest) > 20 and 99 < max(longest) < 100.1


def test_a_block_may_add_attention_and_mlp_in_one_sum(directions):
    model = SimpleNamespace(
        hf_config=SimpleNamespace(use_parallel_residual=True),  # as GPT-NeoX
        dtype=torch.float32,
        get_hidden_size=lambda: 8,
        get_total_num_hidden_layers=lambda: 30,
    )
    one_sum = Limits.of(model)
    both = {"ablate": "r", "sites": ["attn", "mlp"]}
    program = parse_program("p", both, directions, one_sum)
    assert len(one_sum.places(program.interventions)) == 30
    with pytest.raises(InputError, match=r"program 'p': ablate 'r': .* in one sum"):
        parse_program("p", {"ablate": "r", "sites": ["mlp"]}, directions, one_sum)
    model.hf_config.use_parallel_residual = False
    parse_program("p", {"ablate": "r", "sites": ["mlp"]}, directions, Limits.of(model))


def test_a_monitor_must_fit_the_model(directions, tmp_path):
    directions["r"].save(tmp_path / "r")
    given = {"directions": {"r": str(tmp_path / "r")}}

    def parse(block, those):
        return parse_settings({**given, "monitor": {"direction": "r", "block_input": block}}, those)

    assert parse(29, limits()).monitor.block_input == 29
    with pytest.raises(InputError, match="monitor: block_input is 30; the model has 30 blocks"):
        parse(30, limits())
    with pytest.raises(InputError, match=r"monitor: direction 'r' has hidden size 8; .* has 16"):
        parse(1, Limits(16, 30, torch.float32))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ({"ablate": "r", "strength": 8}, r"'p' can make .* overflow; ablate 'r' .* factor of 0.25"),
        ({"set": "r", "value": 1e30}, "set 'r' must be weaker"),
        ({"clamp": "r", "low": 1e30}, "clamp 'r' must be weaker"),
        ([{"ablate": "t"}, {"add": "r", "coefficient": 1e30, "layers": [1]}], "'t' and add 'r'"),
        ({"ablate": "r", "block_input": 30}, "no place .* block_input 30; the .* 0 to 29"),
        ({"ablate": "r", "layers": [30, 31]}, r"'p': ablate 'r': .* at layers \(30, 31\)"),
        (
            [{"ablate": "r"}, {"ablate": "r"}],
            "program 'p': ablate 'r' and ablate 'r': several directions at one place",
        ),
        ({"ablate": "long"}, "ablate 'long': the direction has hidden size 9; the model has 8"),
    ],
)
def test_programs_that_do_not_fit_the_model_are_refused(directions, program, words):
    given = {**directions, "long": Direction(torch.ones(9))}
    with pytest.raises(InputError, match=words):
        parse_program("p", program, given, limits())
    parse_program("p", program, given)  # of no known model


def test_requests_that_are_too_strong_are_refused(directions):
    programs = {"p": parse_program("p", {"ablate": "r"}, directions, limits())}
    with pytest.raises(InputError, match=r"strength of program 'p' is 1000.*; expected a finite"):
        read_steering({"steer": "p", "steer_strength": 10**400}, programs, None)
    for strength in (6, -1, 1e30):
        with pytest.raises(InputError, match=r"of program 'p' could make .* expected -0.07.* to 2"):
            read_steering({"steer": "p", "steer_strength": strength}, programs, None)
    assert read_steering({"steer": "p", "steer_strength": 2}, programs, None).strength == 2.0
    assert read_steering({"steer": "p", "steer_strength": -0.05}, programs, None)


def test_the_largest_strength_is_a_setting(directions, tmp_path):
    directions["r"].save(tmp_path / "r")
    given = {
        "directions": {"r": str(tmp_path / "r")},
        "programs": {"p": {"ablate": "r", "block_input": 1}},
    }
    for others, strength in (({}, 2.0), ({"max_strength": 3}, 3.0)):
        read = parse_settings({**given, **others}, limits())
        assert read.programs["p"].strengths[1] == pytest.approx(strength)
        assert read.limits.strength == strength


def test_what_the_experiment_reads_is_checked_before_a_worker_sees_it():
    catalog = Catalog(parse_settings({"reads": 2}), 1)
    kinds = ["nothing", 0, 4], ["logits", -1, 4], ["moments", 2, 4], ["scores", True, 4]
    for bad in ("logits", [], ["logits", 0], ["scores", 0, "4"], *kinds):
        with pytest.raises(
            InputError, match=r"expected \[moments or .*, number, length of prompt\]"
        ):
            catalog.read({READ: bad})
    for good in (["moments", 1, 4], ["scores", 70, 4]):
        assert catalog.read({READ: good}) is None
    with pytest.raises(InputError, match="an engine whose settings have 'reads'"):
        Catalog(parse_settings({}), 1).read({READ: ["logits", 0, 4]})


# --- keys that would silently leave a request unsteered


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("steering", "steer"),
        ("Steer", "steer"),
        ("steer_program", "steer"),
        ("program", "steer"),
        ("programme", "steer"),
        ("steer_strenght", "steer_strength"),
        ("steer-strength", "steer_strength"),
        ("steering_strength", "steer_strength"),
        ("strength", "steer_strength"),
    ],
)
def test_misspelled_keys_are_refused(programs, key, right):
    for extra in ({key: "r"}, {"steer": "r", key: 0.7}):
        with pytest.raises(InputError, match=f"has '{key}'; expected '{right}'"):
            read_steering(extra, programs, None)


def test_from_and_to_beside_a_flat_program_are_refused(programs):
    rights = {"from": "steer_from", "to": "steer_to", "position": "steer_positions"}
    for key, right in rights.items():
        with pytest.raises(InputError, match=f"has '{key}'; expected '{right}'"):
            read_steering({"steer": "r", key: 10}, programs, None)
        with pytest.raises(InputError, match=f"has '{key}'; expected '{right[6:]}' in steer"):
            read_steering({"steer": {"program": "r"}, key: 10}, programs, None)
        with pytest.raises(InputError, match=f"has '{key}'; expected '{right}'"):
            read_steering({key: 10}, programs, "r")  # the default
        assert read_steering({key: 10}, programs, None) is None  # another's, perhaps
        assert read_steering({"steer": "none", key: 10}, programs, None) is None


def test_keys_of_others_pass(programs):
    names = "seed stream steps top_k session_id kv_transfer_params ec_transfer_params structured"
    extra = dict.fromkeys([*names.split(), "options", "position_ids"], 1)
    assert read_steering(extra, programs, None) is None
    assert read_steering({**extra, "steer": "r"}, programs, None) is not None


def test_a_strength_needs_a_program(programs):
    for extra in ({"steer_strength": 0.5}, {"steer": {"strength": 0.5}}):
        with pytest.raises(InputError, match=r"strength 0\.5 and no program"):
            read_steering(extra, programs, None)
        assert read_steering(extra, programs, "r").strength == 0.5
