"""What a prompt says of the stages of a video: rules, models, functions."""

import pytest

from diffalign.search.video.stages import (
    SplitByModel,
    SplitRules,
    splitter_of,
    stage_at,
    stage_prompts,
)

CASES = {
    "a photo of a dog moving left and a red apple": ("a photo of a dog and a red apple", 0, 0),
    "a dog walking slowly to the right": ("a dog", 0, 0),
    "a cat that appears beside a clock": ("a clock", 0, "a cat beside a clock"),
    "a photo of a cat that disappears above a clock": (
        "a photo of a cat above a clock",
        0,
        "a photo of a clock",
    ),
    "first a red ball, then a blue ball": ("a red ball", 0, "a blue ball"),
    "a dog sits, then it runs. Finally a cat comes": ("a dog sits", 0, "a cat comes"),
    "a photo of a dog": (0, 0, 0),
    "ein roter Ball": (0, 0, 0),
    "a photo of a moving van": (0, 0, 0),
}


@pytest.mark.parametrize("prompt", list(CASES))
def test_rules(prompt):
    expected = tuple(text or prompt for text in CASES[prompt])
    assert SplitRules()(prompt) == expected


class Writer:
    """Stands for a language model."""

    tokens = 20

    def __init__(self, text):
        self.text = text

    def generate(self, question, tokens):
        assert "a dog runs" in question
        assert tokens == 60
        return self.text


def test_a_language_model_splits():
    split = SplitByModel(Writer(" a dog\n2. a dog runs\n3. a dog far away\nThat is all."))
    assert split("a dog runs") == ("a dog", "a dog runs", "a dog far away")
    with pytest.raises(ValueError, match="the model gave 2 of 3 stages"):
        SplitByModel(Writer(" a dog\n2. a dog runs"))("a dog runs")


def test_stages_by_name():
    assert stage_prompts(splitter_of("whole"), "a dog") == dict.fromkeys(
        ("first", "middle", "last"), "a dog"
    )
    assert stage_prompts(splitter_of("rules"), "a dog running")["first"] == "a dog"
    assert splitter_of(print) is print
    with pytest.raises(ValueError, match=r"three texts.* got \['a dog'\]"):
        stage_prompts(lambda prompt: [prompt], "a dog")


def test_stages_of_chunks():
    assert [stage_at(level, 4) for level in range(4)] == ["first", "middle", "middle", "last"]
    assert [stage_at(level, 2) for level in range(2)] == ["first", "last"]
    assert stage_at(0, 1) == "first"
