"""Noisy captions: how often each fault occurs, that a fault is what it says, and that every caption
stays a sentence of the world's grammar."""

import random
from collections import Counter
from typing import Any

import pytest

from diffalign.embedded.workshop.noisy_captions import (
    ERRORS,
    OMISSIONS,
    CaptionNoise,
    Statement,
    arrays,
)
from diffalign.embedded.workshop.train_denoiser import RELATIONS_MIX
from diffalign.embedded.world.captions import Group, geneval, paraphrase, words
from diffalign.embedded.world.scenes import Scene, World
from diffalign.embedded.world.tokens import LENGTH, grammar_words
from diffalign.embedded.world.vocabulary import OPPOSITE
from diffalign.tasks.geneval.verdict import parse_prompt

COUNT = 4_000
LIMIT = 4.5
"""Standard errors that a measured share may be off: once in 150,000 for a normal variable."""


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(World(RELATIONS_MIX).scenes(1_000_000, COUNT))


@pytest.fixture(scope="module")
def statements(scenes: list[Scene]) -> list[Statement]:
    rng = random.Random(0)
    return [CaptionNoise().statement(rng, scene.groups, scene.relation) for scene in scenes]


def spare(scene: Scene) -> bool:
    """Whether a fact of the scene can be left out: anything beyond one native object."""
    return scene.kind != "single"


def assert_share(hits: int, total: int, expected: float) -> None:
    """``hits`` of ``total`` is ``expected`` up to ``LIMIT`` standard errors."""
    error = (expected * (1 - expected) / total) ** 0.5
    assert hits / total == pytest.approx(expected, abs=LIMIT * error)


@pytest.mark.slow
def test_shares_of_omissions_and_errors(scenes: list[Scene], statements: list[Statement]) -> None:
    omitted = [s.omission is not None for scene, s in zip(scenes, statements) if spare(scene)]
    assert_share(sum(omitted), len(omitted), 0.35)
    assert_share(sum(s.error is not None for s in statements), COUNT, 0.15)
    assert not any(s.omission for scene, s in zip(scenes, statements) if not spare(scene))


@pytest.mark.parametrize(
    ("kind", "omissions", "errors"),
    [
        ("two", {"object"}, {"class"}),
        ("count", {"number"}, {"class", "number"}),
        ("colour", {"colour"}, {"class", "colour"}),
        ("position", {"object", "relation"}, {"class", "relation"}),
        ("two_coloured", {"object", "colour"}, {"class", "colour"}),
        ("position_coloured", set(OMISSIONS) - {"number"}, set(ERRORS) - {"number"}),
    ],
)
@pytest.mark.few(1)
def test_the_kinds_of_fact_are_drawn_evenly(
    kind: str, omissions: set[str], errors: set[str]
) -> None:
    scenes = list(World({kind: 1.0}).scenes(1_000_000, COUNT))
    rng = random.Random(1)
    noise = CaptionNoise(0.5, 0.5)
    statements = [noise.statement(rng, scene.groups, scene.relation) for scene in scenes]
    for names, values in ((omissions, [s.omission for s in statements]),
                          (errors, [s.error for s in statements])):  # fmt: skip
        counts = Counter(value for value in values if value)
        assert set(counts) == names
        for count in counts.values():
            assert_share(count, sum(counts.values()), 1 / len(names))


def test_an_omission_leaves_out_one_fact_and_changes_none(
    scenes: list[Scene], statements: list[Statement]
) -> None:
    for scene, statement in zip(scenes, statements):
        if statement.omission == "object":
            assert len(statement.groups) == len(scene.groups) - 1
            assert set(statement.groups) < set(scene.groups)
            assert statement.relation is None
        elif statement.omission == "relation":
            assert (statement.groups, statement.relation) == (scene.groups, None)
            assert scene.relation is not None
        elif statement.omission:
            pairs = [(a, b) for a, b in zip(scene.groups, statement.groups, strict=True) if a != b]
            ((before, after),) = pairs
            bare = {"colour": (before.count, "native"), "number": (0, before.colour)}
            assert (after.count, after.colour) == bare[statement.omission]
            assert after.name == before.name
            assert statement.relation == scene.relation


def test_an_error_changes_one_fact(scenes: list[Scene], statements: list[Statement]) -> None:
    for scene, statement in zip(scenes, statements):
        if statement.error == "relation":
            assert scene.relation is not None
            assert statement.groups == scene.groups
            assert statement.relation == OPPOSITE[scene.relation]
        elif statement.error:
            pairs = [(a, b) for a, b in zip(scene.groups, statement.groups, strict=True) if a != b]
            ((a, b),) = pairs
            changes = {"class": a.name != b.name, "colour": a.colour != b.colour}
            changes["number"] = a.count != b.count
            assert [kind for kind, change in changes.items() if change] == [statement.error]
            assert len({group.name for group in statement.groups}) == len(scene.groups)
            assert sum(group.count for group in statement.groups) <= 4
            assert statement.relation == scene.relation


def test_faulty_captions_are_sentences_of_the_grammar(
    scenes: list[Scene], statements: list[Statement]
) -> None:
    """Words and length are what the tokenizer knows; GenEval's parser reads back what was meant."""
    vocabulary = set(grammar_words())
    rng = random.Random(2)
    for scene, statement in zip(scenes, statements):
        facts = (statement.groups, statement.relation)
        for sentence in (geneval(*facts), paraphrase(rng, *facts)):
            assert set(words(sentence)) <= vocabulary
            assert len(words(sentence)) + 2 <= LENGTH
        if statement.error and scene.kind in ("single", "colour", "two", "position"):
            record: Any = parse_prompt(geneval(*facts))
            assert record is not None
            classes = sorted(clause["class"] for clause in record["include"])
            assert classes == sorted(group.name for group in statement.groups)


def test_a_group_without_number_is_a_bare_plural() -> None:
    assert geneval((Group("dog", 0), Group("cat")), None) == "a photo of dogs and a cat"
    assert geneval((Group("bus", 0, "red"),), None) == "a photo of red buses"


def test_captions_repeat_and_pictures_are_the_worlds_own() -> None:
    """Same seed, same captions; without faults, and for faultless captions, the scene's own."""
    world = World(RELATIONS_MIX)
    images, captions = arrays(world, CaptionNoise(), 5, 200)
    truth_images, truth_captions, _ = world.arrays(5, 200)
    assert (images == truth_images).all()
    assert arrays(world, CaptionNoise(), 5, 200)[1] == captions
    assert arrays(world, CaptionNoise(), 6, 200)[1] != captions
    assert arrays(world, CaptionNoise(0, 0), 5, 200)[1] == truth_captions
    changed = sum(a != b for a, b in zip(captions, truth_captions, strict=True))
    # .35 for the .92 of scenes that can spare a fact, and .15: .47.
    assert_share(changed, 200, 0.35 * 0.92 + 0.15)


@pytest.mark.parametrize("arguments", [(-0.1, 0.1), (0.2, 1.2), (0.6, 0.6)])
def test_impossible_shares_are_refused(arguments: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        CaptionNoise(*arguments)
