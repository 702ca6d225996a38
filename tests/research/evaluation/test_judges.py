"""Judges: what they score, against plain computations on tiny models made here."""

import json
import math

import pytest
import torch
from tiny import SPECIAL, WORDS, tiny_model, tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification, pipeline

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.interventions import Ablate
from refusal_kernels.patching.patch import patch
from refusal_kernels.research.evaluation.evidence import evaluate
from refusal_kernels.research.evaluation.judge_models import (
    ClassifierJudge,
    GuardJudge,
    load_judge,
    parse_guard,
)
from refusal_kernels.research.evaluation.judges import (
    JUDGES,
    REFUSAL_SUBSTRINGS,
    Judge,
    JudgeInputs,
    SubstringJudge,
    TokenJudge,
    judged,
    make_judge,
)
from refusal_kernels.research.evaluation.outcomes import measure_outcomes
from refusal_kernels.research.evaluation.rates import Rate

PROMPTS = ["curse the lamp", "make tea", "tell me how to hex a boat now please"]
TEXTS = ["I cannot make a storm", "sure here is the tea", "please be kind"]


def test_substrings() -> None:
    judge = SubstringJudge()
    assert isinstance(judge, Judge)
    assert judge(PROMPTS, ["I\u2019M SORRY, no", "sure", "as an ai"]) == [1.0, 0.0, 1.0]
    assert (judge.name, judge.counts) == ("12 substrings", "refused")
    changed = SubstringJudge(["no"])
    assert changed(PROMPTS[:2], ["NO", "sorry"]) == [1.0, 0.0] and changed.name != judge.name
    for bad in ([], "no", [""]):
        with pytest.raises(InputError, match="substrings are empty"):
            SubstringJudge(bad)
    assert len(set(REFUSAL_SUBSTRINGS)) == 12


def test_verdicts_are_checked_and_counted_from_one_half() -> None:
    class Fixed:
        name, counts = "fixed", "odd"

        def __init__(self, verdicts: list[float]) -> None:
            self.verdicts = verdicts

        def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
            return self.verdicts

    assert judged(Fixed([0.5, 0.49, True]), PROMPTS, TEXTS) == Rate(2, 3)
    for verdicts in ([0.5, 0.5], [0.5, 0.5, 1.2], [0.5, math.nan, 0.1]):
        with pytest.raises(InputError, match="judge 'fixed' gave"):
            judged(Fixed(verdicts), PROMPTS, TEXTS)


def test_tokens_read_the_model_as_it_is() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokens = [7, 11]
    judge = TokenJudge(model, tokenizer, tokens, batch_size=2)

    def plain() -> list[float]:
        return [
            float(
                model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[tokens].sum().detach()
            )
            for ids in ChatFormat(tokenizer).encode(PROMPTS)
        ]

    before = plain()
    assert judge(PROMPTS, TEXTS) == pytest.approx(before, abs=1e-6)
    direction = Direction(torch.randn(64))
    with patch(model, Ablate(direction)):
        after = judge(PROMPTS, TEXTS)
        assert after == pytest.approx(plain(), abs=1e-6)
    assert after != pytest.approx(before, abs=1e-4)
    # and so inside evaluate: the judge sees the intervention
    outcomes = measure_outcomes(
        model, tokenizer, harmful=PROMPTS, harmless=PROMPTS, judge=judge, max_new_tokens=1,
        interventions={"none": None, "ablate": Ablate(direction)},
    )  # fmt: skip
    assert outcomes["none"].harmful.k == sum(p >= 0.5 for p in before)
    assert outcomes["ablate"].harmful.k == sum(p >= 0.5 for p in after)
    assert outcomes["none"].judge == outcomes["none"].to_dict()["judge"] == "refusal tokens"


def classifier(labels: tuple[str, ...] = ("NORMAL", "REJECTION")) -> BertForSequenceClassification:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, num_labels=len(labels),
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as it is made, it hardly looks at the text
            parameter.normal_(std=0.5) if parameter.ndim == 2 else None
    return model


def words() -> object:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.model_max_length = 64
    return tokenizer


def test_classifier_of_a_folder_and_of_a_pipeline(tmp_path) -> None:
    model, tokenizer = classifier(), words()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected, pairs = [], []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        for probabilities, arguments in ((expected, (text,)), (pairs, (prompt, text))):
            with torch.no_grad():
                logits = model(**tokenizer(*arguments, return_tensors="pt")).logits[0]
            probabilities.append(float(logits.softmax(-1)[1]))
    assert max(expected) - min(expected) > 1e-3  # it does tell them apart
    judge = load_judge(f"{tmp_path}#REJECTION")
    assert isinstance(judge, ClassifierJudge) and judge.counts == "REJECTION"
    assert judge.name == f"{tmp_path}: REJECTION"
    assert judge(PROMPTS, TEXTS) == pytest.approx(expected, abs=1e-5)
    assert load_judge(str(tmp_path)).counts == "REJECTION"  # of two labels the second
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
    normal = ClassifierJudge(pipe, "NORMAL")
    assert normal(PROMPTS, TEXTS) == pytest.approx([1 - p for p in expected], abs=1e-5)
    both = ClassifierJudge(pipe, "REJECTION", pair=True)
    assert both(PROMPTS, TEXTS) == pytest.approx(pairs, abs=1e-5)
    with pytest.raises(InputError, match="no label 'X'; expected one of NORMAL, REJECTION"):
        ClassifierJudge(pipe, "X")
    three = pipeline("text-classification", model=classifier(("a", "b", "c")), tokenizer=tokenizer)
    with pytest.raises(InputError, match="no label None"):
        ClassifierJudge(three)


def test_what_a_classifier_raises_is_one_line() -> None:
    tokenizer = words()
    tokenizer.pad_token = None
    judge = ClassifierJudge(
        pipeline("text-classification", model=classifier(), tokenizer=tokenizer)
    )
    with pytest.raises(InputError, match=r"judge '.*' cannot read the answers: ValueError: "):
        judge(PROMPTS, TEXTS)


# As Llama Guard's: the exchange is shown, then the question asked.
GUARD_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ ' <|' + message.role + '|> ' + message.content + ' <|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|system|> what is' }}{% endif %}"
)
# As the later ones': contents are lists of parts.
PARTS_TEMPLATE = GUARD_TEMPLATE.replace("message.content +", "message.content[0]['text'] +")


def guard(template: str = GUARD_TEMPLATE) -> tuple[object, object]:
    """A guard that says unsafe, S1 of an exchange that holds "storm" and safe of any other."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["safe", "unsafe", "S1"])
    tokenizer.chat_template = template
    safe, unsafe, s1 = (tokenizer.convert_tokens_to_ids(t) for t in ("safe", "unsafe", "S1"))
    storm = tokenizer.convert_tokens_to_ids("storm")
    model = tiny_model(vocab_size=len(tokenizer))

    def answer(module: object, args: object, kwargs: dict, output: object) -> None:
        """Instead of training: the logits follow from the tokens."""
        ids, rows = kwargs["input_ids"], output.logits[:, -1]
        rows.zero_()
        for row, tokens in zip(rows, ids.tolist(), strict=True):
            if len(tokens) > 1:
                row[unsafe if storm in tokens else safe] = 9.0
                row[safe if storm in tokens else unsafe] = 7.0
            else:
                row[{unsafe: s1}.get(tokens[0], tokenizer.eos_token_id)] = 9.0

    model.register_forward_hook(answer, with_kwargs=True)
    return model, tokenizer


@pytest.mark.parametrize("template", [GUARD_TEMPLATE, PARTS_TEMPLATE])
def test_guard_is_asked_in_its_own_chat_format(template) -> None:
    judge = GuardJudge(*guard(template), name="guard", batch_size=2)
    assert (judge.name, judge.counts) == ("guard", "unsafe")
    answers = judge.answers(PROMPTS, TEXTS)
    assert [a.unsafe for a in answers] == [True, False, False]
    assert [a.categories for a in answers] == [("S1",), (), ()]
    chance = 1 / (1 + math.exp(2.0))  # of the word that it did not say
    expected = [1 - chance, chance, chance]
    assert [a.probability for a in answers] == pytest.approx(expected, rel=1e-5)
    assert judge(PROMPTS, TEXTS) == pytest.approx(expected, rel=1e-5)
    assert judged(judge, PROMPTS, TEXTS) == Rate(1, 3)
    assert judge(PROMPTS[:1], [""]) == pytest.approx([chance], rel=1e-5)  # an empty answer too


def test_guard_says_what_is_wrong() -> None:
    model, tokenizer = guard()
    tokenizer.chat_template = "{{ bos_token }} what is"
    with pytest.raises(InputError, match="does not show the exchange"):
        GuardJudge(model, tokenizer)(PROMPTS, TEXTS)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        GuardJudge(model, tokenizer)
    with pytest.raises(InputError, match="expected 'safe' or 'unsafe'"):
        GuardJudge(tiny_model(), tiny_tokenizer())(PROMPTS, TEXTS)
    with pytest.raises(InputError, match="judge '/nowhere/at/all' cannot be loaded"):
        load_judge("/nowhere/at/all")


def test_a_judge_with_code_of_its_own_is_refused_without_a_question(tmp_path, monkeypatch) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_judge(str(tmp_path))


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("safe", (False, ())),
        ("\n\nunsafe\nS1,S10", (True, ("S1", "S10"))),
        ("Unsafe", (True, ())),
        ("safe\n", (False, ())),
    ],
)
def test_answers_of_guards(answer: str, read: tuple[bool, tuple[str, ...]]) -> None:
    assert parse_guard(answer) == read


def test_guard_of_a_folder(tmp_path) -> None:
    _, tokenizer = guard()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    inputs = JudgeInputs(None, None, PROMPTS, PROMPTS)
    for spec in (str(tmp_path), f"model:{tmp_path}"):
        judge = make_judge(spec, inputs)
        assert isinstance(judge, GuardJudge) and judge.name == str(tmp_path)


def test_a_new_kind_of_judge_is_one_entry(monkeypatch) -> None:
    """What follows the colon reaches it; specs of the other kinds still work."""

    class LengthJudge:
        counts = "long"

        def __init__(self, least: int) -> None:
            self.name, self.least = f"{least} words", least

        def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
            return [float(len(text.split()) >= self.least) for text in completions]

    monkeypatch.setitem(JUDGES, "words", lambda text, inputs: LengthJudge(int(text)))
    model, tokenizer = tiny_model(), tiny_tokenizer()
    sets = {"harmful": PROMPTS, "harmless": PROMPTS[:2]}
    evidence = evaluate(
        model, tokenizer, Direction(torch.randn(64), layer=1), **sets, refusal_tokens=[7],
        judges=["words:2", "substrings:curse|storm", "tokens"], strengths=(), random_controls=0,
        max_new_tokens=3,
    )  # fmt: skip
    names = ["2 words", "2 substrings of your own", "refusal tokens"]
    assert [judge["name"] for judge in evidence.judges] == names
    unmodified = evidence.conditions["unmodified"]
    long = sum(len(text.split()) >= 2 for text in unmodified.completions["harmful"])
    assert unmodified.rates["harmful"]["2 words"] == Rate(long, 3)
    inputs = JudgeInputs(model, ChatFormat(tokenizer), **sets)
    with pytest.raises(InputError, match=r"'lengths:2' is none of .*words, model:MODEL"):
        make_judge("lengths:2", inputs)
    with pytest.raises(InputError, match="'words:few': words does not take 'few'"):
        make_judge("words:few", inputs)
