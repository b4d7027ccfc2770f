"""What a reward is, and rewards by name.

A reward maps images [B, 3, H, W] in [0, 1] and one prompt per image to [B] numbers, higher is
better. Third parties join by the entry point group ``diffalign.rewards``: each entry loads a
function without required arguments that returns a reward.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args, get_type_hints

from torch import Tensor

from diffalign.core import Reward, Stage
from diffalign.core.errors import nearest
from diffalign.core.registry import Registry
from diffalign.core.values import converted, split


@dataclass(frozen=True, slots=True)
class Facts:
    """What a user wants to know of a reward before its files are fetched."""

    # of the weights
    licence: str = "–"
    # where the weights come from: a hub id, or a file and its home
    source: str = "–"
    # parameters, of the whole model and of what sees images
    size: str = "–"
    # of the image side's weights in 16 bits, and beside them for one image with gradient
    memory: str = "–"
    # rank correlation with people (Spearman) on images of T2I-CompBench, or what is known instead
    best: str = "–"


class BaseReward(ABC):
    """A reward that checks its arguments; subclasses write ``score``."""

    # gradients flow to the images
    differentiable: bool = False
    # the score depends on the prompt
    needs_prompt: bool = True
    name: str = "reward"
    # frames that a video needs to be scored
    least: int = 1
    # scores that ``unit`` maps to 0 and 1
    span: tuple[float, float] = (0.0, 1.0)
    facts: ClassVar[Facts] = Facts()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] scores, higher is better.

        Raises: ValueError unless images are floating point [B, 3, H, W] and there is one prompt per
        image; TypeError for a single string.
        """
        self.check(images, prompts)
        return self.score(images, prompts)

    def check(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Raise for arguments that are no batch of images with a prompt each."""
        if isinstance(prompts, str):
            raise TypeError(
                f"{self.name}: prompts must be a sequence with one prompt per image; got one "
                "string. Pass [prompt] * B."
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{self.name}: images must be [B, 3, H, W] in [0, 1]; got shape "
                f"{list(images.shape)}."
            )
        if not images.is_floating_point():
            raise ValueError(
                f"{self.name}: images must be floating point in [0, 1]; got {images.dtype}. "
                "Divide uint8 images by 255."
            )
        if len(prompts) != len(images):
            raise ValueError(
                f"{self.name}: prompts must be one per image; got {len(images)} images and "
                f"{len(prompts)} prompts."
            )

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] scores of checked arguments."""

    def at(self, stage: Stage) -> BaseReward:
        """The reward for a video of which only this stage matters; most rewards see all of it."""
        return self

    def unit(self, scores: Tensor) -> Tensor:
        """Scores on a scale of about [0, 1], for sums of different rewards. The ranges become
        alike, not the spreads: ``Weighted`` with scales is the honest mixture."""
        low, high = self.span
        return (scores - low) / (high - low)


@dataclass(frozen=True, slots=True)
class RewardInfo:
    """A reward by name."""

    name: str
    # what it is, in one line
    description: str
    # gradients flow to the images
    differentiable: bool
    facts: Facts = Facts()


ROOM = "diffalign.rewards"
REWARDS: Registry[Reward] = Registry(
    "reward",
    ROOM,
    targets={
        name: f"{ROOM}.{place}"
        for name, place in (
            ("emoji-clip", "emoji_clip:EmojiClip"),
            ("emoji-clip-2", "emoji_clip:EmojiClip2"),
            ("emoji-judge", "emoji_judge:EmojiJudge"),
            ("emoji-objects", "emoji_readers:EmojiObjects"),
            ("emoji-colours", "emoji_readers:EmojiColours"),
            ("emoji-numbers", "emoji_readers:EmojiNumbers"),
            ("emoji-aware", "emoji_readers:EmojiAware"),
            ("emoji-failure", "failure:EmojiFailure"),
            ("emoji-story", "emoji_story:EmojiStory"),
            ("clip", "clip_score:ClipScore"),
            ("hps-v2", "hps:HPSv2"),
            ("hps-v2-1", "hps:HPSv21"),
            ("hps-v3", "hps_v3:HPSv3"),
            ("pick-score", "pick_score:PickScore"),
            ("image-reward", "image_reward:ImageReward"),
            ("mps", "mps:MPS"),
            ("aesthetic", "aesthetic:Aesthetic"),
            ("aesthetic-v1", "aesthetic:AestheticV1"),
            ("blip-vqa", "blip_vqa:BlipVQA"),
            ("da-score", "blip_vqa:DAScore"),
            ("blip-itm", "blip_itm:BlipITM"),
            ("vqa-score", "vqa_score:VQAScore"),
            ("vqa-score-t5", "vqa_score_t5:VQAScoreT5"),
            ("tifa", "question_scores:TIFA"),
            ("dsg", "question_scores:DSG"),
            ("clip-i", "subject:ClipI"),
            ("dino", "subject:Dino"),
            ("ocr", "ocr_text:OCRText"),
            ("reno-set", "weighted:ReNOSet"),
            ("category-aware", "category_aware:CategoryAware"),
            ("frames", "video:OverFrames"),
            ("motion-smoothness", "video:MotionSmoothness"),
            ("flicker", "video:Flicker"),
            ("subject-consistency", "video:SubjectConsistency"),
            ("jpeg-size", "toys:JpegSize"),
            ("brightness", "toys:Brightness"),
            ("redness", "toys:Redness"),
        )
    },
    advice="diffalign.rewards.available() lists all.",
)
"""Constructors of rewards by name."""


def available() -> tuple[RewardInfo, ...]:
    """Every reward that ``load`` knows, the package's own first; those of other packages are named
    but not imported."""
    shipped = [_info(name, REWARDS.get(name)) for name in REWARDS.targets]
    others = REWARDS.plugins.items()
    return (*shipped, *(RewardInfo(name, f"from {place}", False) for name, place in others))


def _info(name: str, make: Callable[..., Reward]) -> RewardInfo:
    text = " ".join((inspect.getdoc(make) or "").split()).replace("``", "").partition(". ")[0]
    if not (isinstance(make, type) and issubclass(make, BaseReward)):
        return RewardInfo(name, text.rstrip("."), False)
    return RewardInfo(name, text.rstrip("."), make.differentiable, make.facts)


def load(name: str, **options: object) -> Reward:
    """The reward ``name``, on the CPU; ``options`` go to its constructor. On a command line they
    may stand in the name: ``"clip:source=FOLDER,dtype=bf16"``.

    Raises: ValueError for an unknown name or option (with the nearest ones), for a name that two
    packages claim, and for missing or foreign model files.
    """
    key, _, written = name.partition(":")
    key = key.replace(".", "-")  # "hps-v2.1" is "hps-v2-1"
    make = REWARDS.get(key)
    known = options_of_reward(make)
    values = dict(options)
    for item in filter(None, split(written)):
        option, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"The reward option {item!r} in {name!r} is not key=value.")
        option = option.strip().replace("-", "_")
        if option not in known:
            near = nearest(option, known) if known else "none; it has no options"
            raise ValueError(f"{key} has no option {option!r}. Nearest: {near}.")
        values[option] = converted(text.strip(), known[option], f"{key}:{option}")
    return make(**values)


def options_of_reward(make: Callable[..., Reward]) -> dict[str, object]:
    """Names and types of a constructor's options, those of ``**placement`` included."""
    function = make.__init__ if isinstance(make, type) else make  # type: ignore[misc]
    try:
        hints = get_type_hints(function)
    except NameError:  # it takes objects only, of types that are not loaded
        return {}
    hints.pop("return", None)
    known: dict[str, object] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in hints:
            known |= get_type_hints(get_args(hints[name])[0])
        elif name in hints:
            known[name] = hints[name]
    return known
