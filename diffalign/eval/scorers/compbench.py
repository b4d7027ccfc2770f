"""T2I-CompBench++ with models of the hub, and questions of a user's file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from diffalign.core.types import Json, Pipeline
from diffalign.eval.benchmarks import Item
from diffalign.eval.scorers import canary
from diffalign.eval.scorers.base import Outcome
from diffalign.eval.scorers.blip import Blip
from diffalign.eval.scorers.boxes import Boxes, renamed
from diffalign.eval.scorers.depth import Depth
from diffalign.eval.scorers.pretrained import facts_of, pretrained
from diffalign.tasks.compbench import rules
from diffalign.tasks.compbench.prompts import CATEGORIES, mixture

if TYPE_CHECKING:
    from torch import Tensor

CLIP = "openai/clip-vit-base-patch32"


class ClipScore:
    """Cosine of image and text by CLIP ViT-B/32 (Radford et al. 2021, arXiv:2103.00020)."""

    def __init__(self, name: str = CLIP, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.name, self.device = name, device
        self.model: Pipeline = pretrained(CLIPModel, name, device)
        self.processor: Pipeline = CLIPProcessor.from_pretrained(name)

    def facts(self) -> Json:
        """Name and hash of the network."""
        return facts_of(self.name, self.model)

    def score(self, image: Tensor, text: str) -> float:
        """Cosine in [-1, 1] of an image [3, H, W] in [0, 1] and a text."""
        import torch

        from diffalign.generate.samples import picture

        inputs = self.processor(
            text=[text], images=[picture(image)], return_tensors="pt", truncation=True
        ).to(self.device)
        with torch.no_grad():
            output = self.model(**inputs)
        return float((output.image_embeds * output.text_embeds).sum())


@dataclass(frozen=True)
class Models:
    """The models of the rules; each is loaded when a prompt first needs it."""

    device: str

    @cached_property
    def blip(self) -> Blip:
        return Blip(device=self.device)

    @cached_property
    def boxes(self) -> Boxes:
        return Boxes(device=self.device)

    @cached_property
    def depth(self) -> Depth:
        return Depth(device=self.device)

    @cached_property
    def clip(self) -> ClipScore:
        return ClipScore(device=self.device)


class CompBenchScorer:
    """The rules of all eight categories; ``mode``: how the depth map is read, see ``rules``."""

    def __init__(self, models: Models, mode: rules.Mode = "compat") -> None:
        self.models, self.mode = models, mode
        self.name = "compbench" if mode == "compat" else f"compbench-{mode}"
        self.rules: dict[str, Callable[[Tensor, Item], tuple[float, Json]]] = {
            **dict.fromkeys(("color", "shape", "texture"), self.attribute),
            "spatial": self.spatial,
            "3d_spatial": self.spatial_3d,
            "numeracy": self.numeracy,
            "non_spatial": self.clip,
            "complex": self.complex,
        }

    def facts(self) -> Json:
        """Networks, thresholds and modes."""
        parts = ("blip", "boxes", "depth", "clip")
        models = {name: getattr(self.models, name).facts() for name in parts}
        return {"name": self.name, **models, "depth_mode": self.mode, "chunks": rules.CHUNKS}

    def knows(self, item: Item) -> bool:
        """Prompts of T2I-CompBench."""
        return item.tag in CATEGORIES and item.place.startswith("compbench/")

    def score(self, images: Sequence[Tensor], item: Item) -> list[Outcome]:
        """Scores of one prompt's images by the rule of its category."""
        outcomes = []
        for image in images:
            value, measured = self.rules[item.tag](image, item)
            outcomes.append(Outcome(value, "", measured))
        return outcomes

    def attribute(self, image: Tensor, item: Item) -> tuple[float, Json]:
        """BLIP's answers for the noun phrases."""
        phrases = [str(phrase) for phrase in item.facts["noun_phrases"]][: rules.CHUNKS]
        answers = [self.models.blip.yes(image, phrase) for phrase in phrases]
        return rules.attribute(answers), {"yes": dict(zip(phrases, answers))}

    def objects(self, image: Tensor, nouns: Sequence[str]) -> list[rules.Labelled]:
        """Detections of an image under the nouns of its prompt."""
        names = [rules.person(noun) for noun in nouns]
        detections = rules.by_score(self.models.boxes.detect(image))
        return [renamed(detection, names) for detection in detections]

    def spatial(self, image: Tensor, item: Item) -> tuple[float, Json]:
        """The 2D rule; ``complex`` has parsed objects of its own."""
        nouns = item.facts.get("spatial_objects")
        if nouns is None:
            nouns = [item.facts["nouns"][i] for i in (0, -1)]
        detections = self.objects(image, nouns)
        return rules.spatial(detections, nouns, rules.relation_of(item.prompt)), _measured(
            detections
        )

    def spatial_3d(self, image: Tensor, item: Item) -> tuple[float, Json]:
        """The depth rule."""
        nouns = [item.facts["nouns"][i] for i in (0, -1)]
        detections, depth = self.objects(image, nouns), self.models.depth.map(image)
        relation = rules.relation_of(item.prompt, rules.RELATIONS_3D)
        value = rules.spatial_3d(detections, nouns, relation, depth, self.mode)
        return value, _measured(detections)

    def numeracy(self, image: Tensor, item: Item) -> tuple[float, Json]:
        """The counting rule."""
        detections = self.objects(image, item.facts["objects"])
        value = rules.numeracy(detections, item.facts["objects"], item.facts["counts"])
        return value, _measured(detections)

    def clip(self, image: Tensor, item: Item) -> tuple[float, Json]:
        """The plain cosine; for ``complex`` of the prompt without its adjectives."""
        text = str(item.facts.get("no_adj", item.prompt))
        return self.models.clip.score(image, text), {"text": text}

    def complex(self, image: Tensor, item: Item) -> tuple[float, Json]:
        """The mean of two or three of the scores above."""
        rule = {"attribute": self.attribute, "spatial": self.spatial, "clip": self.clip}
        names = mixture(item.prompt)
        parts = {name: rule[name](image, item) for name in names}
        value = rules.complex_score({name: part[0] for name, part in parts.items()}, names)
        return value, {name: {"score": part[0], **part[1]} for name, part in parts.items()}

    def canary(self) -> str | None:
        """BLIP and CLIP must tell plain colours and a cat from a bicycle, the detector must find
        the cat, and the depth model must see it before the room."""
        image = canary.cat()
        labels = {d.label for d in self.objects(image, ["cat"]) if d.score >= rules.FLOOR}
        return (
            canary.preference("BLIP", self.models.blip.yes)
            or canary.preference("CLIP", self.models.clip.score)
            or (None if "cat" in labels else "the detector finds no cat in a photograph of one")
            or canary.nearness(self.models.depth.map(image))
        )


def _measured(detections: Sequence[rules.Labelled]) -> Json:
    rows = [[d.label, round(d.score, 6), *(round(v, 3) for v in d.box)] for d in detections]
    return {"detections": rows}


class QuestionScorer:
    """Soft-TIFA (Kamath et al. 2025, the rule of GenEval 2) with BLIP as the one who answers.

    The score is the mean over the questions of the probability of the expected answer's first
    token; the geometric mean stands beside it. Another judge gives other numbers.
    """

    name = "blip-vqa"

    def __init__(self, blip: Blip) -> None:
        self.blip = blip

    def facts(self) -> Json:
        """Network and rule."""
        return {"name": self.name, "blip": self.blip.facts(), "rule": "soft-tifa mean"}

    def knows(self, item: Item) -> bool:
        """Prompts with questions."""
        return bool(item.facts.get("questions"))

    def score(self, images: Sequence[Tensor], item: Item) -> list[Outcome]:
        """Scores of one prompt's images."""
        outcomes = []
        for image in images:
            values = [self.blip.correct(image, q, a) for q, a in item.facts["questions"]]
            mean, product = soft_tifa(values)
            wrong = [q for (q, _), v in zip(item.facts["questions"], values) if v < 0.5]
            reason = f"unsure of {'; '.join(wrong)}" if wrong else ""
            outcomes.append(Outcome(mean, reason, {"answers": values, "geometric": product}))
        return outcomes

    def canary(self) -> str | None:
        """BLIP must tell plain colours, and a cat from a bicycle."""
        return canary.preference("BLIP", self.blip.yes)


def soft_tifa(values: Sequence[float]) -> tuple[float, float]:
    """Arithmetic and geometric mean of the probabilities of the expected answers."""
    mean = sum(values) / len(values)
    return mean, math.prod(values) ** (1 / len(values))


def published(device: str) -> CompBenchScorer:
    """The scorer of all categories, with the depth map read as the published program reads it."""
    return CompBenchScorer(Models(device))


def fixed(device: str) -> CompBenchScorer:
    """The scorer of all categories, with the depth map read by rows and columns as they are."""
    return CompBenchScorer(Models(device), "fixed")


def questions(device: str) -> QuestionScorer:
    """The scorer of prompts with questions."""
    return QuestionScorer(Blip(device=device))
