"""What a prompt states, what another one loses, and edits that lose nothing."""

import random

import pytest

from diffalign.embedded.world.captions import Group, geneval, paraphrase
from diffalign.embedded.world.vocabulary import OBJECTS, RELATIONS
from diffalign.search.wording import crossed, edits, facts, loss, parts, singular, whole


def things(prompt):
    return [(set(t.words), t.count, set(t.colours)) for t in facts(prompt).things]


def test_things_numbers_and_colours():
    assert things("a photo of a red apple and two green clocks") == [
        ({"apple"}, 1, {"red"}),
        ({"clock"}, 2, {"green"}),
    ]
    assert things("an orange orange") == [({"orange"}, 1, {"orange"})]
    assert things("3 traffic lights, broccoli") == [
        ({"traffic", "light"}, 3, set()),
        ({"broccoli"}, 1, set()),
    ]
    assert things("a dog and some cats") == [({"dog"}, 1, set()), ({"some", "cat"}, 0, set())]


def test_a_colour_behind_its_noun():
    for prompt in (
        "an apple that is red",
        "an apple, the apple is red",
        "a red apple, the apple is red",
    ):
        assert things(prompt) == [({"apple"}, 1, {"red"})]


def test_a_relation_has_two_spellings():
    spellings = (
        "a dog left of a cat",
        "a dog on the left side of a cat",
        "a cat to the right of a dog",
    )
    for prompt in spellings:
        for other in spellings:
            assert loss(prompt, other) is None
    assert loss("a dog left of a cat", "a dog right of a cat") == "dog left of cat"
    assert loss("a dog left of a cat", "a cat left of a dog") == "dog left of cat"
    assert loss("a dog next to a cat", "a cat beside a dog") is None
    assert loss("a dog above a cat", "a dog and a cat") == "dog above cat"


@pytest.mark.parametrize(
    ("original", "other", "reason"),
    [
        ("a red apple and a green clock", "a green apple and a red clock", "1 apple red"),
        ("a red apple and a green clock", "a red apple", "1 clock green"),
        ("a red apple", "an apple", "1 apple red"),
        ("an apple", "a red apple", "1 apple"),
        ("two cats", "three cats", "2 cat"),
        ("two cats", "cats", "2 cat"),
        ("two cats", "two cats and a cat", "how many cat there are"),
        ("a red apple and a green apple", "two red apples", "1 apple red"),
        ("a shiny metal teapot", "a metal teapot", "1 metal shiny teapot"),
    ],
)
def test_what_is_lost_is_named(original, other, reason):
    assert loss(original, other) == reason


@pytest.mark.parametrize(
    ("original", "other"),
    [
        ("two cats", "2 cats, sharp focus"),
        ("a photo of a bike", "a picture of a bicycle"),
        ("a red apple and a green clock", "a green clock. a red apple"),
        ("a dog on a beach", "a photograph of a dog on a wide beach, well lit"),
        ("a red apple and a green apple", "a green apple with a red apple"),
        ("three people", "three people, detailed"),
    ],
)
def test_what_is_no_loss(original, other):
    assert loss(original, other) is None


@pytest.mark.parametrize(
    ("many", "one"),
    [("cats", "cat"), ("benches", "bench"), ("people", "person"), ("knives", "knife"),
     ("berries", "berry"), ("boxes", "box"), ("bus", "bus"), ("glass", "glass"),
     ("skis", "skis"), ("mice", "mouse"), ("tennis", "tennis")],
)  # fmt: skip
def test_singular(many, one):
    assert singular(many) == one


def test_the_worlds_own_paraphrases_state_the_same():
    """GenEval's sentence and a free caption of the same facts, where no synonym is narrower."""
    rng, count = random.Random(0), 0
    narrow = {
        "person", "bird", "handbag", "backpack", "dining table", "cell phone", "computer mouse",
        "computer keyboard", "tv remote", "potted plant", "sports ball", "tie", "hair drier",
    }  # fmt: skip
    names = [name for name in OBJECTS if name not in narrow]
    for _ in range(300):
        first, second = rng.sample(names, 2)
        groups = (
            Group(first, 1, rng.choice(("red", "native"))),
            Group(second, 1, rng.choice(("blue", "native"))),
        )
        relation = rng.choice((None, *RELATIONS))
        sentence, caption = geneval(groups, relation), paraphrase(rng, groups, relation)
        count += loss(sentence, caption) is None
    assert count == 300


def test_parts_are_put_together_again():
    prompt = "a photo of a red apple, sharp focus, centered"
    assert parts(prompt) == ("a photo of ", "a red apple", ("sharp focus", "centered"))
    assert whole(*parts(prompt)) == prompt
    assert parts("two dogs, one cat") == ("", "two dogs, one cat", ())


PROMPTS = (
    "a photo of a red apple and a green clock",
    "a photo of three cats",
    "a photo of a dog left of a bike",
    "a shiny teapot on a wooden table",
)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_edits_are_different_and_most_state_the_same(prompt):
    texts = list(edits(prompt))
    assert prompt not in texts
    fine = [text for text in texts if loss(prompt, text) is None]
    assert len(set(fine)) >= 8
    assert len(fine) >= 0.8 * len(texts), [t for t in texts if t not in fine]


def test_edits_by_hand():
    texts = set(edits("a photo of a red apple and a green clock"))
    assert {
        "a picture of a red apple and a green clock",
        "a photo of a green clock and a red apple",
        "a photo of a red apple. a green clock",
        "a photo of an apple that is red and a green clock",
        "a photo of a red apple and a green clock, the apple is red",
        "a photo of a red apple and a green clock, sharp focus",
    } <= texts
    assert "a photo of 3 cats" in set(edits("a photo of three cats"))
    relation = set(edits("a photo of a dog left of a bike"))
    assert {
        "a photo of a dog to the left of a bike",
        "a photo of a bike right of a dog",
        "a photo of a dog left of a bicycle",
    } <= relation
    assert "two cars, detailed" in set(edits("two cars, sharp focus, detailed"))
    assert "two automobiles" in set(edits("two cars"))


def test_a_cross_has_parts_of_both():
    first, second = "a photo of x, centered", "a picture of y, detailed"
    rng = random.Random(0)
    children = {crossed(first, second, rng) for _ in range(200)}
    assert {parts(child)[0] for child in children} == {"a photo of ", "a picture of "}
    assert {parts(child)[1] for child in children} == {"x", "y"}
    assert {len(parts(child)[2]) for child in children} == {0, 1, 2}
