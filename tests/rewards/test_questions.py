"""Phrases and questions by rules, and what is made of answers, by hand."""

import math

import pytest
import torch
from torch import nn

from diffalign.rewards.question_scores import DSG, TIFA
from diffalign.rewards.questions import (
    Question,
    graph_of,
    phrases_of,
    question_about,
    questions_of,
    read_questions,
)


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a photo of a red car and a blue cat", ("a red car", "a blue cat")),
        ("a dog to the left of a cat", ("a dog", "a cat")),
        (
            "two dogs, a green apple on the wooden table",
            ("two dogs", "a green apple", "the wooden table"),
        ),
        ("a woman wearing a red hat", ("a woman", "a red hat")),
        ("a tall building next to the left side", ("a tall building",)),
        ("Three birds sitting on a wire.", ("three birds", "a wire")),
        ("", ()),
    ],
)
def test_phrases(prompt, phrases):
    assert phrases_of(prompt) == phrases


def test_at_most_eight_phrases():
    assert len(phrases_of(", ".join(["a dog"] * 12))) == 8


def test_questions_of_phrases():
    assert question_about("a red car") == "is there a red car in the image?"
    assert question_about("two dogs") == "are there two dogs in the image?"
    assert [q.text for q in questions_of("a cat on a chair")] == [
        "is there a cat in the image?",
        "is there a chair in the image?",
    ]
    assert [q.text for q in questions_of("behind")] == ["does the image show behind?"]


def test_the_graph_of_a_prompt():
    graph = graph_of("a red dog to the left of two cats")
    assert [(q.text, q.parents) for q in graph] == [
        ("is there a dog in the image?", ()),
        ("is the dog red?", (0,)),
        ("are there cats in the image?", ()),
        ("are there exactly two cats in the image?", (2,)),
        ("is the dog left of the cats?", (0, 2)),
    ]


@pytest.mark.parametrize(
    ("questions", "text"),
    [
        ((), "has no questions"),
        ((Question("a?", "maybe"),), "the answer 'maybe' of 'a\\?' is none of its choices yes, no"),
        ((Question("a?", parents=(3,)),), r"depends on question \(3,\), and there are 1"),
    ],
)
def test_bad_questions(questions, text):
    with pytest.raises(ValueError, match=text):
        read_questions(lambda prompt: questions, "a dog", questions_of, "tifa")


class Known:
    """A reader whose answers are given: probabilities of the choices by question."""

    name, differentiable, batch = "known", True, 8

    def __init__(self, table):
        self.table = table
        self.network = nn.Linear(1, 1)

    def log_choices(self, images, questions):
        return [[torch.tensor(self.table[q.text]).log() for q in row] for row in questions]


IMAGE = torch.zeros(1, 3, 4, 4)


def test_tifa_by_hand():
    questions = [
        Question("what animal?", "cat", ("dog", "cat", "bird")),
        Question("how many?", "two", ("one", "two")),
    ]
    # "cat" is likeliest with less than one half
    reader = Known({"what animal?": [0.35, 0.40, 0.25], "how many?": [0.7, 0.3]})
    soft = TIFA(questions={"p": questions}, reader=reader)
    assert float(soft(IMAGE, ["p"])) == pytest.approx(0.35)
    hard = TIFA(questions={"p": questions}, reader=reader, soft=False)
    assert float(hard(IMAGE, ["p"])) == 0.5
    assert not hard.differentiable
    with pytest.raises(ValueError, match="tifa has no gradient here"):
        hard(IMAGE.clone().requires_grad_(), ["p"])


def test_dsg_by_hand():
    """Parent fails: the child is struck, the grandchild only where failure passes on."""
    questions = [
        Question("parent"),
        Question("child", parents=(0,)),
        Question("grandchild", parents=(1,)),
        Question("other"),
    ]
    answers = {"parent": 0.2, "child": 0.9, "grandchild": 0.8, "other": 0.6}
    reader = Known({text: [p, 1 - p] for text, p in answers.items()})

    def score(**options):
        return float(DSG(questions={"p": questions}, reader=reader, **options)(IMAGE, ["p"]))

    assert score(soft=False) == pytest.approx(2 / 4)
    assert score(soft=False, cascade=True) == pytest.approx(1 / 4)
    soft = (0.2 + 0.9 * 0.2 + 0.8 * 0.9 + 0.6) / 4
    assert score() == pytest.approx(soft)
    passed = (0.2 + 0.9 * 0.2 + 0.8 * (0.9 * 0.2) + 0.6) / 4
    assert score(cascade=True) == pytest.approx(passed)
    late = [Question("parent", parents=(1,)), Question("child")]
    with pytest.raises(ValueError, match="must come after question 1"):
        DSG(questions={"p": late}, reader=reader, cascade=True)(IMAGE, ["p"])
    assert math.isclose(soft, 0.425)


def test_readers_by_name():
    with pytest.raises(ValueError, match="reader must be blip, vlm or an object; got 'gpt'"):
        TIFA(reader="gpt")
