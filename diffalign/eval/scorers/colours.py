"""GenEval's colour classifier: CLIP ViT-L/14 on the object before a grey ground (Ghosh et al. 2023,
arXiv:2310.11513)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from diffalign.core.identity import model_hash
from diffalign.core.types import Json, Pipeline
from diffalign.tasks.geneval.prompts import COLORS

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

GREY = 153 / 255
TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)


class Colours:
    """Says which of the ten colours an object has; it always answers.

    ``model``: a CLIP of open_clip; ``preprocess``: Pillow image -> [3, H, W]; ``tokenize``: texts
    -> tokens.
    """

    def __init__(
        self,
        model: Pipeline,
        preprocess: Callable[[Image.Image], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        device: str = "cpu",
    ) -> None:
        self.model, self.device = model.eval().requires_grad_(False).to(device), device
        self.preprocess, self.tokenize = preprocess, tokenize
        self.weights: dict[str, Tensor] = {}

    @classmethod
    def official(cls, device: str) -> Colours:
        """ViT-L/14 with OpenAI's weights.

        Raises: ValueError where they cannot be had.
        """
        import open_clip

        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                "ViT-L-14", pretrained="openai"
            )
        except Exception as error:  # the hub client has many
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"the colour classifier ViT-L-14 cannot be read: {why}") from error
        return cls(model, preprocess, open_clip.get_tokenizer("ViT-L-14"), device)

    def facts(self) -> Json:
        """Hash of the network and how it is used."""
        return {"revision": model_hash(self.model), "ground": "#999999", "crop": True}

    def classes(self, name: str) -> Tensor:
        """[10, D]: for each colour the mean of its templates' directions, made once per class."""
        import torch

        if name not in self.weights:
            rows = []
            for colour in COLORS:
                texts = [template.format(colour=colour, name=name) for template in TEMPLATES]
                with torch.no_grad():
                    features = self.model.encode_text(self.tokenize(texts).to(self.device))
                mean = torch.nn.functional.normalize(features.float(), dim=-1).mean(0)
                rows.append(mean / mean.norm())
            self.weights[name] = torch.stack(rows)
        return self.weights[name]

    def crop(self, image: Tensor, box: tuple[float, ...], mask: Tensor | None) -> Tensor:
        """The object in its box [3, h, w], grey outside its mask."""
        import torch

        if mask is not None:
            image = torch.where(mask, image, torch.full_like(image, GREY))
        x1, y1, x2, y2 = (round(value) for value in box)
        return image[:, max(y1, 0) : max(y2, y1 + 1), max(x1, 0) : max(x2, x1 + 1)]

    def of(self, image: Tensor, box: tuple[float, ...], mask: Tensor | None, name: str) -> str:
        """The colour of an object of class ``name`` in an image [3, H, W] in [0, 1]."""
        import torch

        from diffalign.generate.samples import picture

        pixels = self.preprocess(picture(self.crop(image, box, mask)))[None].to(self.device)
        with torch.no_grad():
            features = self.model.encode_image(pixels)[0].float()
        return COLORS[int((self.classes(name) @ features).argmax())]
