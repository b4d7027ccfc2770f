"""What all tiny pipelines share: the table of recipes, seeded weights and seeded inputs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.core.types import Keywords, Pipeline

Inputs = Keywords


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller of ``tiny_pipeline`` or ``tiny_inputs`` asked for.

    ``batch`` and ``steps`` matter to inputs only, ``text`` (real tiny text encoders, prompts as
    strings) to both, and ``params`` (least size of a benchmark UNet; 0 means tiny) to the UNet
    builder.
    """

    name: str
    variant: str = ""
    text: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    batch: int = 1
    steps: int = 4
    params: int = 0

    def has(self, *words: str) -> bool:
        """Whether the class name contains one of ``words``."""
        return any(word in self.name for word in words)


Build = Callable[[Request], Pipeline]
MakeInputs = Callable[[Request, "Draw"], Inputs]


def everything(tensor: Tensor, call: Inputs, row: int) -> slice:
    """For ``Hook.image``: a tensor [B, S, E] of image tokens only."""
    return slice(0, tensor.shape[1])


def behind_text(tensor: Tensor, call: Inputs, row: int) -> slice:
    """For ``Hook.image``: a joint tensor [B, S, E] that begins with the text."""
    return slice(call["encoder_hidden_states"].shape[1], tensor.shape[1])


@dataclass(frozen=True, slots=True)
class Hook:
    """Attention layers at which two walks in lock-step meet, see ``testing/lockstep.py``."""

    # regular expression which the layers' names match as a whole
    layers: str
    # module of the layer whose input they exchange, "" for the layer's own output or its first
    inner: str = "to_out.0"
    # (that tensor [B, S, E], arguments of the denoiser's call, row) -> its image tokens
    image: Callable[[Tensor, Inputs, int], slice] = everything
    # layer -> what it adds to the image tokens by itself in the running call; None: nothing
    added: Callable[[nn.Module], Callable[[], Tensor] | None] | None = None


@dataclass(frozen=True, slots=True)
class Rigid:
    """A model whose number of blocks is part of it: the others would change in a shorter stack."""

    # entries of its config with the number of blocks of each stack
    depth: tuple[str, ...]
    # name of a stack -> a module that stands for a block that is not there
    absent: Callable[[str], nn.Module]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to build a tiny pipeline and to call it, and what tests must know of it."""

    build: Build
    inputs: MakeInputs
    variants: tuple[str, ...] = ("",)
    # it also exists with text encoders
    text: bool = False
    # one call takes more than half a second
    slow: bool = False
    # where the image tokens are in its attention layers, written down independently of the library
    hooks: tuple[Hook, ...] = ()
    # variant with which blocks are skipped and deleted; None leaves that to a relative
    deep: str | None = ""
    rigid: Rigid | None = None


RECIPES: dict[str, Recipe] = {}


def register(names: Iterable[str], build: Build, inputs: MakeInputs, **options: Any) -> None:
    """Enter a recipe for each class name, with the options of ``Recipe``; a name entered twice is a
    programming error."""
    recipe = Recipe(build, inputs, **options)
    for name in names:
        assert name not in RECIPES, name
        RECIPES[name] = recipe


CROSS = (Hook(r".*attn2"),)
"""Hooks of models with cross-attention of diffusers' usual names."""


class Draw:
    """Seeded random inputs: every draw has its own label, so adding one input never changes
    another."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.seed = seed
        self.dtype = dtype

    def generator(self, label: str) -> torch.Generator:
        """A CPU generator that depends on the seed and the label only."""
        return torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.seed}/{label}".encode()))

    def normal(self, label: str, *shape: int) -> Tensor:
        """Standard normal tensor of ``shape``."""
        return torch.randn(shape, generator=self.generator(label)).to(self.dtype)

    def image(self, label: str, *shape: int) -> Tensor:
        """Uniform tensor in [0, 1] of ``shape``, usually ``[B, 3, H, W]``."""
        return torch.rand(shape, generator=self.generator(label))

    def mask(self, *shape: int) -> Tensor:
        """Zeros with ones in the right half (of the last axis): repaint the right half."""
        mask = torch.zeros(shape)
        mask[..., shape[-1] // 2 :] = 1.0
        return mask

    def ones(
        self, batch: int, length: int, *, pad: int = 0, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Attention mask ``[batch, length]`` whose last ``pad`` tokens are padding."""
        mask = torch.ones(batch, length, dtype=dtype)
        if pad:
            mask[:, length - pad :] = 0
        return mask


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter a random value, so that nothing is silent by construction (in place,
    reproducible).

    Layers that start at zero (output projections, adaptive gates, ControlNet joints) would make a
    fresh model ignore text, time or noise. Here weights are normal with variance 1 / fan-in
    (embeddings: 1), biases and free tables normal with standard deviation 0.2, and gains (all ones
    at the start) normal around 1 with 0.1. Predictions are then of order one.
    """
    with torch.no_grad():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if not parameter.is_floating_point():
                    continue
                noise = torch.randn(parameter.shape, generator=generator)
                if isinstance(owner, nn.Embedding):
                    value = noise
                elif name == "weight" and parameter.ndim >= 2:
                    value = noise * parameter[0].numel() ** -0.5
                elif bool((parameter == 1).all()):
                    value = 1 + 0.1 * noise
                else:
                    value = 0.2 * noise
                parameter.copy_(value.to(parameter.dtype))


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast as ``from_pretrained(torch_dtype=dtype)`` does: modules a class wants in float32 and
    unsaved buffers stay as they are."""
    keep = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    saved = module.state_dict().keys()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in saved and tensor.is_floating_point() and not keep.intersection(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def assemble(request: Request) -> Pipeline:
    """Build the pipeline of ``request`` with seeded weights; the global random state is left as it
    was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        pipe = RECIPES[request.name].build(request)
    draw = Draw(request.seed, request.dtype)
    done: set[int] = set()
    for label, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module) and id(part) not in done:
            done.add(id(part))
            randomise(part, draw.generator(label))
            part.eval()
            cast(part, request.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
