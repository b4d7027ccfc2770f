"""The embedded detectors as scorers: prompts they know, rules, and a canary that notices."""

from collections import Counter

import pytest
import torch

from diffalign.embedded.world.scenes import HELD_OUT, World
from diffalign.eval.benchmarks import Item, compbench_val, geneval
from diffalign.eval.scorers import NAMES, load_scorer
from diffalign.eval.scorers.emoji import EmojiScorer
from diffalign.eval.scorers.world import knows
from diffalign.tasks.geneval.verdict import Detection, Thresholds


class Fixed:
    """A detector that always sees the same."""

    thresholds = Thresholds()

    def __init__(self, *objects):
        self.objects = [Detection(name, score, box, colour) for name, score, box, colour in objects]

    def detect(self, images):
        return [self.objects for _ in images]


IMAGE = torch.zeros(3, 64, 64)
LEFT, RIGHT = (0.0, 20.0, 20.0, 40.0), (40.0, 20.0, 60.0, 40.0)


def item(category, prompt):
    return next(i for i in compbench_val().items if (i.tag, i.prompt) == (category, prompt))


def test_prompts_of_the_embedded_world():
    assert all(knows(i) for i in geneval().items)
    counts = Counter(i.tag for i in compbench_val().items if knows(i))
    assert counts == {"color": 134, "spatial": 80, "numeracy": 56}
    assert not knows(Item(0, "a cat", "x", "a cat", {}))


def test_rules_on_known_detections():
    bench = ("bench", 0.9, LEFT, "green"), ("bowl", 0.8, RIGHT, "blue")
    colour = item("color", "a green bench and a blue bowl")
    (outcome,) = EmojiScorer("x", Fixed(*bench)).score([IMAGE], colour)
    assert (outcome.score, outcome.reason) == (pytest.approx(0.72), "")
    (outcome,) = EmojiScorer("x", Fixed(bench[0])).score([IMAGE], colour)
    assert (outcome.score, outcome.reason) == (0.0, "no blue bowl")
    pair = ("bird", 0.9, LEFT, None), ("microwave", 0.7, RIGHT, None)
    place = item("spatial", "a bird on the left of a microwave")
    (outcome,) = EmojiScorer("x", Fixed(*pair)).score([IMAGE], place)
    assert outcome.score == pytest.approx(0.25 * 1.6 + 0.5)
    four = [("person", 0.9, (float(x), 0.0, x + 9.0, 9.0), None) for x in (0, 12, 24, 36)]
    boys = item("numeracy", "four boys")
    assert EmojiScorer("x", Fixed(*four)).score([IMAGE], boys)[0].score == 1.0
    assert EmojiScorer("x", Fixed(*four[:3])).score([IMAGE], boys)[0].score == 0.5


def test_the_canary_notices_a_blind_and_a_credulous_judge():
    assert "it calls 0 right" in EmojiScorer("x", Fixed()).canary()


def test_shipped_judges_pass_their_canary_and_know_rendered_scenes():
    judge = load_scorer("emoji-judge")
    assert judge.canary() is None
    assert load_scorer("emoji-judge-2").canary() is None
    scenes = [scene for scene in World().scenes(HELD_OUT.start + 40, 30) if scene.tag][:12]
    right = 0
    for scene in scenes:
        image = torch.from_numpy(scene.image.copy()).permute(2, 0, 1).float() / 255
        facts = scene.metadata()
        (outcome,) = judge.score([image], Item(0, facts["prompt"], facts["tag"], "x", facts))
        right += outcome.score == 1.0
        assert outcome.measured["size"] == [64, 64]
    assert right >= 10
    assert judge.facts()["thresholds"]["threshold"] > 0


def test_unknown_scorers():
    with pytest.raises(ValueError, match=r"unknown scorer 'emoji-juge'; nearest: emoji-judge"):
        load_scorer("emoji-juge")
    assert {"emoji-judge", "mask2former", "compbench", "blip-vqa"} <= set(NAMES)
