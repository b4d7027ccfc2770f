"""Smoothed energy guidance: away from the same model with blurred attention maps."""

import math
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import ClassVar

import torch

from diffalign.core import Attend, Site, Tensor, option
from diffalign.guidance.per_image import wide
from diffalign.guidance.perturbing import MapChange, PerturbedAttention


@cache
def blur_matrix(size: int, blur: float) -> Tensor:
    """``[size, size]`` in float64: a Gaussian filter mirrored at the edges, along one axis.

    It reaches over ``ceil(6 * blur)`` positions made odd, at most over the axis, as in the authors'
    code. Infinite: the mean.
    """
    if math.isinf(blur):
        return torch.full((size, size), 1.0 / size, dtype=torch.float64)
    width = math.ceil(6 * blur)
    width = min(width + 1 - width % 2, size + 1 - size % 2)
    offsets = torch.arange(width) - width // 2
    weights = torch.exp(-0.5 * (offsets.double() / blur).square()) if width > 1 else torch.ones(1)
    weights = (weights / weights.sum()).double()
    places = (torch.arange(size)[:, None] + offsets).abs()
    mirrored = torch.minimum(places, 2 * (size - 1) - places).expand(size, width)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, mirrored, weights.expand(size, width))


def blurred(queries: Tensor, grid: tuple[int, int, int], blur: float) -> Tensor:
    """Queries [B, A, N, D] of an image's tokens, each frame of ``grid`` blurred in two dimensions.

    Tokens behind the grid stay as they are.
    """
    frames, height, width = grid
    count = frames * height * width
    image = wide(queries[:, :, :count]).reshape(*queries.shape[:2], *grid, -1)
    down, across = (blur_matrix(size, blur).to(image) for size in (height, width))
    image = torch.einsum("hi,batiwd->bathwd", down, image)
    image = torch.einsum("wi,bathid->bathwd", across, image)
    smooth = image.flatten(2, 4).to(queries.dtype)
    return torch.cat((smooth, queries[:, :, count:]), 2)


@dataclass(frozen=True, slots=True)
class BlurredQueries(MapChange):
    """The queries of image tokens are blurred over the image."""

    blur: float = option(meaning="as that of SEG", low=0.0, infinite=True)

    # outermost: techniques further in see the blurred queries
    order: ClassVar[int] = -1
    spatial: ClassVar[bool] = True

    def __call__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        assert site.grid is not None
        rows = site.row_parts or (site.parts,)
        queries = []
        for i, parts in enumerate(rows):
            row, image = q if len(rows) == 1 else q[i : i + 1], parts["image"]
            smooth = blurred(row[:, :, image], site.grid, self.blur)
            queries.append(
                torch.cat((row[:, :, : image.start], smooth, row[:, :, image.stop :]), 2)
            )
        return attend(torch.cat(queries), k, v)


@dataclass(frozen=True, slots=True)
class SEG(PerturbedAttention):
    """Adds ``seg_scale * (cond - smoothed)`` to CFG, ``smoothed`` with blurred attention maps.

    Hong 2024, arXiv:2408.00760: blurring the queries of chosen self-attention layers
    over the image is blurring their attention scores, which flattens the energy landscape of
    attention. An infinite ``blur`` takes the mean query; the authors' code does so
    above 9999.
    Differs from the paper: it has square images and no joint attention; here queries are blurred
    after norm and rotary embedding, where the equality with blurred scores holds, along both sides
    of the image and each frame of a video by itself, and text queries are left alone.
    Cost: 3 passes per step inside the window, 2 outside; 2 and 1 at ``scale`` 1.
    Raises: ``UnsupportedModel`` on models whose self-attention has no map (Sana) or is not known.
    """

    _: KW_ONLY
    seg_scale: float = option(
        3.0, "weight of the smoothed pass; 0 is off, 3 is the authors' setting", usual=(0.0, 6.0)
    )
    blur: float = option(
        math.inf,
        "standard deviation of the blur in tokens of the layer; 0 is off, infinite the mean query",
        low=0.0,
        infinite=True,
        usual=(0.0, 20.0),
    )

    @property
    def push(self) -> float:
        return self.seg_scale if self.blur > 0.0 else 0.0

    def change(self, names: frozenset[str]) -> BlurredQueries:
        return BlurredQueries(names=names, blur=self.blur)
