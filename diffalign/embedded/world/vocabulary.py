"""What can appear in the embedded world: GenEval's 80 objects, ten colours and four relations.

The names, their order and the grammar of the prompts are those of Ghosh et al., "GenEval: An
Object-Focused Framework for Evaluating Text-to-Image Alignment" (2023, arXiv:2310.11513); plurals
and articles are mechanical there ("benchs", "an orange orange") and stay so here.
"""

from __future__ import annotations

OBJECTS: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The 80 object names in GenEval's (COCO's) order; the index is the class number of every embedded
model."""

COLOURS: tuple[str, ...] = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)
"""GenEval's ten colours in its order."""

NATIVE = "native"
"""The colour of an object whose caption names none: the glyph as it was drawn."""

NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four")

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
"""The subject stands <relation> the target; y grows downwards, so "above" means the smaller y."""

OPPOSITE: dict[str, str] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}


def article(phrase: str) -> str:
    """``phrase`` with GenEval's article: "an" before a vowel letter, else "a" ("an umbrella", "a
    bench")."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(name: str) -> str:
    """GenEval's mechanical plural: "es" after an s, else "s" ("buses", "skises", "benchs")."""
    return name + ("es" if name.endswith("s") else "s")
