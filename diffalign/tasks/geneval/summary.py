"""GenEval's summary: shares per tag, and an overall only for a complete run (Ghosh, Hajishirzi,
Schmidt 2023, arXiv:2310.11513)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from diffalign.tasks.geneval.prompts import TAGS, prompts


@dataclass(frozen=True, slots=True)
class TagScore:
    """Of one tag."""

    images: int
    # distinct ones
    prompts: int
    # share of images
    correct_images: float
    # share of prompts with any correct image
    correct_prompts: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The official summary, shares in [0, 1].

    GenEval's number is ``overall``; ``mean_of_tags`` must not be called so.
    """

    tags: dict[str, TagScore]
    images: int
    # distinct ones
    prompts: int
    correct_images: float
    # share of prompts with any correct image
    correct_prompts: float
    # mean of the image accuracies of the tags present, whatever they hold
    mean_of_tags: float
    # unweighted mean of the six tags' image accuracies; None unless every official prompt has
    # exactly ``images_per_prompt`` results
    overall: float | None
    # what is missing for the overall, "" if nothing
    incomplete: str
    images_per_prompt: int


def _score(lines: Sequence[tuple[str, str, bool]]) -> TagScore:
    hit: dict[str, bool] = {}
    for _, key, correct in lines:
        hit[key] = hit.get(key, False) or correct
    return TagScore(
        len(lines),
        len(hit),
        sum(correct for _, _, correct in lines) / len(lines),
        sum(hit.values()) / len(hit),
    )


def _incomplete(counts: Mapping[str, int], images_per_prompt: int) -> str:
    """Why ``counts`` (canonical metadata -> images) is not the full official set; "" if it is.
    Names the first prompt of each kind."""
    official = [json.dumps(item, sort_keys=True) for item in prompts()]

    def name(key: str) -> str:
        return repr(json.loads(key).get("prompt", key))

    problems = []
    if few := [key for key in official if counts.get(key, 0) < images_per_prompt]:
        tags = sorted({str(json.loads(key)["tag"]) for key in few}, key=TAGS.index)
        first = f"{name(few[0])} has {counts.get(few[0], 0)}"
        problems.append(
            f"{len(few)} of {len(official)} prompts have fewer than {images_per_prompt} images, "
            f"first {first} (tags {', '.join(tags)})"
        )
    if many := [key for key in official if counts.get(key, 0) > images_per_prompt]:
        problems.append(
            f"{len(many)} prompts have more than {images_per_prompt} images, first "
            f"{name(many[0])} has {counts[many[0]]}"
        )
    if strange := sorted(set(counts) - set(official)):
        problems.append(f"{len(strange)} prompts are not GenEval's, first {name(strange[0])}")
    return "; ".join(problems)


def summary(results: Iterable[Mapping[str, object]], images_per_prompt: int = 4) -> Summary:
    """Summarise result lines (``tag``, ``correct``, ``metadata`` as a mapping or as JSON text; see
    ``result_line``).

    A prompt is a distinct metadata. The overall needs every official prompt with exactly
    ``images_per_prompt`` images (official: 4).

    Raises: ValueError without results, for metadata that is no JSON, or if ``images_per_prompt`` <
    1; TypeError for a line that lacks a field.
    """
    if images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be >= 1; got {images_per_prompt}.")
    lines: list[tuple[str, str, bool]] = []
    for number, result in enumerate(results):
        tag, correct, metadata = result.get("tag"), result.get("correct"), result.get("metadata")
        if (
            not isinstance(tag, str)
            or not isinstance(correct, bool)
            or not isinstance(metadata, str | Mapping)
        ):
            raise TypeError(
                f"result {number} needs tag (str), correct (bool) and metadata (JSON text or "
                f"mapping); got {dict(result)!r}."
            )
        try:
            facts = json.loads(metadata) if isinstance(metadata, str) else metadata
            key = json.dumps(facts, sort_keys=True)
        except ValueError as error:
            raise ValueError(
                f"the metadata of result {number} is not JSON: {metadata!r}."
            ) from error
        lines.append((tag, key, correct))
    if not lines:
        raise ValueError(
            "summary needs at least one result line; got none. Score some images first."
        )
    present = sorted(
        {tag for tag, _, _ in lines},
        key=lambda tag: (TAGS.index(tag) if tag in TAGS else len(TAGS), tag),
    )
    tags = {tag: _score([line for line in lines if line[0] == tag]) for tag in present}
    counts: dict[str, int] = {}
    for _, key, _ in lines:
        counts[key] = counts.get(key, 0) + 1
    incomplete = _incomplete(counts, images_per_prompt)
    mean, total = sum(score.correct_images for score in tags.values()) / len(tags), _score(lines)
    return Summary(
        tags=tags,
        images=total.images,
        prompts=total.prompts,
        correct_images=total.correct_images,
        correct_prompts=total.correct_prompts,
        mean_of_tags=mean,
        overall=None if incomplete else mean,
        incomplete=incomplete,
        images_per_prompt=images_per_prompt,
    )
