"""Canaries of scorers of photographs: each part that is broken is named, a sound scorer passes."""

from types import SimpleNamespace

import pytest
import torch

from diffalign.eval.scorers import NAMES, canary
from diffalign.eval.scorers.compbench import CompBenchScorer, QuestionScorer
from diffalign.eval.scorers.geneval import GenEvalScorer
from diffalign.tasks.compbench.rules import Labelled
from diffalign.tasks.geneval.prompts import class_names


def is_cat(image):
    """The photograph is the only picture that is wider than high."""
    return image.shape[-1] > image.shape[-2]


def colour_of(image):
    return ("red", "green", "blue")[int(image.mean((1, 2)).argmax())]


def detector(name="cat", score=0.95, grey=False):
    """Sees one thing in the photograph, and perhaps in grey pictures."""
    label = class_names().index(name)

    def detect(image):
        if not (is_cat(image) or grey):
            return []
        return [SimpleNamespace(label=label, score=score, box=(9.0, 9.0, 90.0, 90.0), mask=None)]

    return SimpleNamespace(detect=detect)


def colours(answer=None):
    return SimpleNamespace(of=lambda image, *others: answer or colour_of(image))


def test_the_photograph():
    image = canary.cat()
    assert image.shape == (3, 300, 451)
    red, green, blue = image.mean((1, 2)).tolist()
    assert red > green > blue  # a ginger cat
    assert 0 <= float(image.min()) <= float(image.max()) <= 1


@pytest.mark.parametrize(
    ("detector", "colours", "message"),
    [
        (detector(), colours(), None),
        (detector(score=0.29), colours(), "calls the photograph of a cat wrong for 'a photo of a"),
        (detector("dog"), colours(), "calls the photograph of a cat wrong for"),
        (detector("bicycle"), colours(), "calls the photograph of a cat wrong for"),
        (detector(grey=True), colours(), "it sees cat with 0.95 in a grey picture"),
        (detector(), colours("red"), "calls a plain green picture red"),
    ],
)
def test_of_geneval(detector, colours, message):
    answer = GenEvalScorer("mask2former", detector, colours).canary()
    assert answer is None if message is None else message in answer


def test_of_geneval_notices_a_detector_that_sees_everything():
    both = SimpleNamespace(
        detect=lambda image: [
            *detector().detect(image),
            *detector("bicycle").detect(image),
        ]
    )
    answer = GenEvalScorer("mask2former", both, colours()).canary()
    assert answer == "it calls the photograph of a cat right for 'a photo of a bicycle'"


def rating(right=True):
    """How well a picture fits a phrase: by its colour, or by the word cat."""

    def ask(image, text):
        word = "cat" if is_cat(image) else colour_of(image)
        return float((word in text) == right)

    return ask


def models(blip=True, clip=True, label="cat", nearer=True):
    depth = torch.zeros(479, 720)
    depth[100:, :600] = 1.0 if nearer else -1.0
    return SimpleNamespace(
        blip=SimpleNamespace(yes=rating(blip)),
        clip=SimpleNamespace(score=rating(clip)),
        boxes=SimpleNamespace(detect=lambda image: [Labelled(label, 0.8, (0.0, 0.0, 9.0, 9.0))]),
        depth=SimpleNamespace(map=lambda image: depth.tolist()),
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({}, None),
        ({"blip": False}, "BLIP finds that a red picture looks more like a green picture"),
        ({"clip": False}, "CLIP finds that"),
        ({"label": "dog"}, "the detector finds no cat"),
        ({"nearer": False}, "sees the cat's nose (-1.00) behind the room (0.00)"),
    ],
)
def test_of_compbench(broken, message):
    answer = CompBenchScorer(models(**broken)).canary()
    assert answer is None if message is None else message in answer


def test_of_questions():
    assert QuestionScorer(models().blip).canary() is None
    assert "BLIP" in QuestionScorer(models(blip=False).blip).canary()


def test_a_cat_that_is_no_better_than_a_bicycle_is_noticed():
    ask = rating()
    answer = canary.preference("X", lambda image, text: 0.5 if is_cat(image) else ask(image, text))
    assert answer == "X finds that a cat looks more like a bicycle"


def test_modes_have_names():
    assert CompBenchScorer(models(), "fixed").name == "compbench-fixed"
    assert {"compbench", "compbench-fixed"} <= set(NAMES)
