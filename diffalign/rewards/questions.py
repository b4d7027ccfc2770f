"""Prompts as yes-or-no questions: yours, or made by rules on words. Published scores use questions
by a language model or phrases by spaCy; with other questions, scores are not those of the papers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

LISTS = {
    "stops": "and or but with on in at of to from by under over behind above below beneath beside "
    "near next left right front into onto through between against around inside outside that which "
    "who while is are was were be being been has have had there it its not no without as for than "
    "then",
    "determiners": "a an the some this that these those his her their",
    "numbers": "two three four five six seven eight nine ten several many",
    "colours": "red orange yellow green blue purple pink brown black white gray grey golden silver",
    "nouns": "building ceiling clothing painting wing king ring string swing earring morning "
    "evening drawing lightning wedding stocking pudding dumpling thing",
    "places": "top side left right bottom",
}
STOPS, DETERMINERS, NUMBERS, COLOURS, NOUNS_IN_ING, PLACES = (
    frozenset(words.split()) for words in LISTS.values()
)
"""Words that end a phrase, words that begin one, and kinds of words; places are no things."""
MEDIUM = re.compile(
    r"^(?:an? |the )?(?:photo|picture|image|painting|drawing|rendering|illustration|photograph) of "
)
RELATIONS = re.compile(
    r"\b(?:to the )?(left of|right of|on top of|in front of|on the left of|on the right of|above|"
    r"below|behind|next to|near|under|on|inside)\b"
)
MOST = 8
"""Phrases that are asked about."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question about an image."""

    text: str
    # what it must be answered with, one of ``choices``
    answer: str = "yes"
    # the answers that are compared; empty for all words that the model knows
    choices: tuple[str, ...] = ("yes", "no")
    # places of the questions that must be answered right before this one counts
    parents: tuple[int, ...] = ()


Questions = Mapping[str, Sequence["Question | str"]] | Callable[[str], Sequence["Question | str"]]
"""Prompt -> its questions, as a table or a function; a text is a yes-or-no question."""


def phrases_of(prompt: str) -> tuple[str, ...]:
    """Noun phrases of a prompt by rules: runs of words between those that end a phrase, at most 8.

    A verb in -ing ends one unless it begins it. Relations such as "left of" are no phrases.
    """
    text = MEDIUM.sub("", prompt.lower().strip())
    phrases: list[str] = []
    run: list[str] = []
    for word in [*re.findall(r"[a-z0-9'-]+|[.,;:!?]", text), "."]:
        content = any(item not in DETERMINERS for item in run)
        verb = word.endswith("ing") and len(word) > 4 and word not in NOUNS_IN_ING and content
        if word in STOPS or verb or not word[0].isalnum() or (word in DETERMINERS and content):
            phrase = " ".join(run)
            if content and phrase.split()[-1] not in PLACES:
                phrases.append(phrase)
            run = [word] if word in DETERMINERS else []
        else:
            run.append(word)
    return tuple(phrases[:MOST])


def question_about(phrase: str) -> str:
    """ "a red car" -> "is there a red car in the image?"."""
    words = phrase.split()
    many = words[0] in NUMBERS or (words[0] not in DETERMINERS and words[-1].endswith("s"))
    return f"{'are' if many else 'is'} there {phrase} in the image?"


def questions_of(prompt: str) -> tuple[Question, ...]:
    """A question for each noun phrase of the prompt; the whole prompt where rules find none."""
    phrases = phrases_of(prompt)
    if not phrases:
        return (Question(f"does the image show {prompt.strip().rstrip('.')}?"),)
    return tuple(Question(question_about(phrase)) for phrase in phrases)


def graph_of(prompt: str) -> tuple[Question, ...]:
    """Questions that depend on each other, in the manner of a Davidsonian scene graph: each thing
    first, then its colour or number, then relations between neighbouring things."""
    text = MEDIUM.sub("", prompt.lower().strip())
    questions: list[Question] = []
    things: list[tuple[str, int]] = []
    for phrase in phrases_of(prompt):
        words = [word for word in phrase.split() if word not in DETERMINERS]
        colours = [word for word in words if word in COLOURS]
        numbers = [word for word in words if word in NUMBERS]
        bare = " ".join(word for word in words if word not in (*colours, *numbers)) or phrase
        plural = bool(numbers)
        place = len(questions)
        noun = bare if plural else f"{'an' if bare[0] in 'aeiou' else 'a'} {bare}"
        questions.append(Question(question_about(noun)))
        things.append((bare, place))
        verb = "are" if plural else "is"
        questions += [Question(f"{verb} the {bare} {c}?", parents=(place,)) for c in colours]
        questions += [
            Question(f"are there exactly {n} {bare} in the image?", parents=(place,))
            for n in numbers
        ]
    for (first, a), (second, b) in pairwise(things):
        start = text.find(first) + len(first)
        between = RELATIONS.search(text[start : text.find(second, start)])
        if between:
            asks = f"is the {first} {between[1]} the {second}?"
            questions.append(Question(asks, parents=(a, b)))
    return tuple(questions) or questions_of(prompt)


def read_questions(
    source: Questions | None, prompt: str, rule: Callable[[str], Sequence[Question]], owner: str
) -> tuple[Question, ...]:
    """The questions of a prompt from the user's table or function, or by ``rule``.

    Raises: ValueError for a prompt without questions, and for a question whose answer is not among
    its choices or whose parents do not exist.
    """
    if source is None:
        items: Sequence[Question | str] = rule(prompt)
    elif callable(source):
        items = source(prompt)
    else:
        items = source.get(prompt, ())
    questions = tuple(Question(item) if isinstance(item, str) else item for item in items)
    if not questions:
        raise ValueError(
            f"{owner}: the prompt {prompt!r} has no questions. Add them to questions=, or leave "
            "questions= out to have them made by rules."
        )
    for question in questions:
        if question.choices and question.answer not in question.choices:
            raise ValueError(
                f"{owner}: the answer {question.answer!r} of {question.text!r} is none of its "
                f"choices {', '.join(question.choices)}."
            )
        if any(not 0 <= parent < len(questions) for parent in question.parents):
            raise ValueError(
                f"{owner}: {question.text!r} depends on question {question.parents}, and there are "
                f"{len(questions)}, counted from 0."
            )
    return questions
