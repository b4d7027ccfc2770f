"""Clips as rendered show all of their own story, and less of one that is false in a fact."""

import pytest
import torch

from diffalign import rewards
from diffalign.embedded.world.clips import ClipWorld
from diffalign.embedded.world.scenes import HELD_OUT
from diffalign.embedded.world.stories import reading, telling
from diffalign.rewards.emoji_story import EmojiStory, story_of
from diffalign.search.video.stages import SplitRules


@pytest.mark.slow
@pytest.mark.parametrize("judge", ["emoji-judge", "emoji-judge-audit"])
def test_own_and_false_stories(judge: str) -> None:
    reward = EmojiStory(judge)
    pairs = list(ClipWorld().wrong(HELD_OUT.start + 500, 12))
    films = torch.stack(
        [torch.from_numpy(clip.pictures()).permute(0, 3, 1, 2) / 255 for clip, _ in pairs]
    )
    own = reward(films, [telling(clip.story) for clip, _ in pairs])
    false = reward(films, [telling(story) for _, story in pairs])
    assert own.shape == (12,)
    assert bool((own > 0.75).all())
    assert bool((false < own - 0.1).all())


def test_what_moves_must_move() -> None:
    clip = next(ClipWorld({"moving": 1.0}, plain=1.0).clips(1_000_000, 1))
    frames = torch.from_numpy(clip.pictures()).permute(0, 3, 1, 2)[None].float() / 255
    still = frames[:, :1].expand_as(frames)
    true, false = (float(EmojiStory()(film, [clip.caption])) for film in (frames, still))
    assert true > 0.9
    assert false < 0.6


def test_one_frame_is_the_beginning_of_a_clip() -> None:
    clip = next(ClipWorld({"still": 1.0}).clips(HELD_OUT.start, 1))
    image = torch.from_numpy(clip.pictures()[:1]).permute(0, 3, 1, 2) / 255
    reward = rewards.load("emoji-story")
    assert float(reward(image, [telling(clip.story)])) > 0.85


@pytest.mark.parametrize(
    "prompt",
    [
        "a photo of a dog moving left and a red apple",
        "a photo of a cat that appears beside a clock",
        "a photo of a cat that appears before a clock",
    ],
)
def test_every_stage_of_the_rules_is_read(prompt: str) -> None:
    names = {role.name for role in reading(prompt).roles}
    for text in SplitRules()(prompt):
        assert {role.name for role in story_of(text).roles} <= names
    assert story_of("a photo of a cat beside a clock") == reading("a photo of a cat and a clock")


def test_what_it_cannot_read_is_said() -> None:
    with pytest.raises(ValueError, match="expected a sentence like"):
        EmojiStory()(torch.zeros(1, 13, 3, 64, 64), ["a walk in the rain"])
    with pytest.raises(ValueError, match="judge must be emoji-judge or emoji-judge-audit; got 'x'"):
        EmojiStory("x")
    assert rewards.load("emoji-story:judge=emoji-judge-audit").name.endswith("audit")
