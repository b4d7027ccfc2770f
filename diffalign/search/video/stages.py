"""What a prompt says of the beginning, the middle and the end of a video, for whoever scores it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args, runtime_checkable

from diffalign.core.search import Stage
from diffalign.search.rewriters import LanguageModel, answers


@runtime_checkable
class Splitter(Protocol):
    """Anything that makes three texts of a prompt: what is there at first, what happens, how it
    ends."""

    def __call__(self, prompt: str, /) -> Sequence[str]:
        """The texts, in that order."""
        ...


STAGES: tuple[Stage, ...] = get_args(Stage)

INSTRUCTION = """A video must show exactly this: {prompt}
Describe it in three short sentences of the same form: the first frame (objects and place, no
motion), what happens in the middle, and how it ends. Add nothing that is not said. Answer with a
numbered list of three and nothing else.
1."""
"""What a language model is told."""

ORDER = re.compile(
    r"[,;.]?\s+(?:and\s+)?(?:then|afterwards|after that|finally|at the end)[,:]?\s+", re.I
)
OPENING = re.compile(r"^(?:at\s+)?first(?:ly)?[,:]?\s+|^in the beginning[,:]?\s+", re.I)
VERBS = (
    "moving|walking|running|flying|jumping|rolling|sliding|driving|swimming|floating|drifting|"
    "falling|rising|bouncing|spinning|turning|rotating|crawling|growing|shrinking"
)
WAYS = (
    r"(?:\s+(?:quickly|slowly|fast|gently|left|right|up|down|upwards?|downwards?|forwards?|"
    r"backwards?|away|around|in circles|to the (?:left|right)|(?:from|to) the (?:left|right|top|"
    r"bottom)))*"
)
# behind a noun: a moving van is no van that moves
MOTION = re.compile(
    rf"(?<!\ba)(?<!\ban)(?<!\bthe)\s+(?:that is |which is |is )?(?:{VERBS}){WAYS}(?=[\s,.]|$)", re.I
)
CHANGES = re.compile(
    r"^(?P<opening>a (?:photo|video|clip) of )?(?P<thing>.+?)\s+(?:that |which )?"
    r"(?P<verb>appears|appearing|disappears|disappearing|vanishes|vanishing)"
    r"(?:\s+(?P<where>(?:beside|above|below|behind|on|under|next to|near|"
    r"(?:left|right) of|in front of|to the (?:left|right) of)\s+)(?P<other>.+?))?[.]?$",
    re.I,
)


@dataclass(frozen=True)
class SplitRules:
    """Splits a prompt by its words: the shipped splitter.

    Sentences in order ("first ..., then ...") become the first, the whole and the last one. A thing
    that appears is not there at first, one that disappears not at the end. Words of motion are
    left out of the first. What no rule knows is the whole prompt at each stage.
    """

    def __call__(self, prompt: str) -> tuple[str, str, str]:
        parts = [part.strip(" ,;.") for part in ORDER.split(prompt.strip())]
        if len(parts) > 1 and all(parts):
            return still(OPENING.sub("", parts[0])), prompt, parts[-1]
        change = CHANGES.match(prompt.strip())
        if change is None:
            return still(prompt), prompt, prompt
        opening, thing, other = (change[name] or "" for name in ("opening", "thing", "other"))
        both = f"{opening}{thing} {change['where']}{other}" if other else f"{opening}{thing}"
        rest = f"{opening}{other}" if other else prompt
        if change["verb"].lower().startswith("appear"):
            return rest, prompt, both
        return both, prompt, rest


@dataclass(frozen=True)
class SplitByModel:
    """Asks a local language model, as ``PromptSearch`` does; nothing is downloaded.

    Raises: ValueError where its answer is no list of three.
    """

    model: LanguageModel

    def __call__(self, prompt: str) -> tuple[str, str, str]:
        text = self.model.generate(INSTRUCTION.format(prompt=prompt), 3 * self.model.tokens)
        texts = answers("1." + text)[:3]
        if len(texts) < 3:
            raise ValueError(f"the model gave {len(texts)} of 3 stages: {text[:200]!r}")
        return texts[0], texts[1], texts[2]


def still(prompt: str) -> str:
    """The prompt without its words of motion."""
    return MOTION.sub("", prompt)


def splitter_of(splitter: str | Splitter) -> Splitter:
    """A splitter by ``rules``, ``whole`` (the prompt at each stage), the folder of a local language
    model, or a function, as it is."""
    if not isinstance(splitter, str):
        return splitter
    if splitter == "rules":
        return SplitRules()
    if splitter == "whole":
        return lambda prompt: [prompt] * 3
    return SplitByModel(LanguageModel(splitter, option="splitter", others="'rules', 'whole'"))


def stage_prompts(splitter: Splitter, prompt: str) -> dict[Stage, str]:
    """The text of each stage. Raises: ValueError for an empty prompt, and for a splitter that does
    not give three texts."""
    if not prompt.strip():
        raise ValueError(
            "an empty prompt has no stages. Say what the video shows, or use another method."
        )
    texts = list(splitter(prompt))
    if len(texts) != 3 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f"splitter must give three texts, of the first, middle and last stage of {prompt!r}; "
            f"got {texts!r}."
        )
    return dict(zip(STAGES, texts))


def stage_at(level: int, count: int) -> Stage:
    """The stage of a video after chunk ``level`` of ``count``: first, last, and middle between."""
    if level == 0:
        return "first"
    return "last" if level == count - 1 else "middle"
